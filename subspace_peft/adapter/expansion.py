"""Expansion: the targets that the shorthands of a config stand for in one model."""

from __future__ import annotations

import copy
from collections.abc import Callable

from peft import PeftConfig
from peft.utils import TaskType
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .base_modules import asked_for, base_modules, computed_from, own_parameters, owned_or_read
from .config import OF_ONE_DIMENSION
from .experts import is_experts, kind_of, routers, stacked_parameters
from .layer import SubspaceLayer
from .quantised import has_foreign_weight, is_packed_linear


def expanded(config: PeftConfig, model: nn.Module, rename: Callable[[str], str]) -> PeftConfig:
    """The config with names in the place of "all" and "all-linear", and the experts that they and other names mean.

    A saved adapter lists its experts, and one of an earlier version has none.

    Args:
        rename: The name by which the config calls a tensor or module of this name.
    """
    config, is_all = copy.copy(config), config.target_modules == "all"
    is_all_linear = isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"
    if is_all or is_all_linear:
        names = _all(model, config) if is_all else _all_linear(model, config)
        config.target_modules = {rename(name) for name in _owning(names, model, config, rename)}
    if config.expected_fingerprint is None:
        stacked = stacked_parameters(model, config, is_all_linear, rename)
        config.target_parameters = sorted({*(config.target_parameters or ()), *stacked}) or None
    return config


def _all(model: nn.Module, config: PeftConfig) -> set[str]:
    """The names that target_modules="all" stands for: every module that owns parameters.

    Raises:
        ValueError: if the model itself owns one, since nothing can be put around it.
    """
    stray = [name for name, parameter in own_parameters(model).items() if asked_for(name, parameter, config)]
    if stray:
        raise ValueError(
            f'target_modules="all" needs every parameter to lie in a submodule; the model itself owns {stray}; wrap '
            "the model in another module, or name the target modules."
        )
    return {name for name, _, _, module in base_modules(model) if own_parameters(module) or is_packed_linear(module)}


def _owning(names: set[str], model: nn.Module, config: PeftConfig, rename: Callable[[str], str]) -> set[str]:
    """Those of the modules that own a parameter which the config asks for; all where none does, for the error."""
    modules = {name: module for name, _, _, module in base_modules(model)}
    return {name for name in names if _owns(name, modules, config, rename)} or names


def _owns(name: str, modules: dict[str, nn.Module], config: PeftConfig, rename: Callable[[str], str]) -> bool:
    module = modules[name]
    if has_foreign_weight(module):
        return config.parameters != OF_ONE_DIMENSION  # to be refused, but where its weight is not asked for
    owned = owned_or_read(name, modules, config, rename)
    if is_experts(module):
        owned |= {kind_of(path): parameter for path, parameter in owned.items()}
    return any(asked_for(path, parameter, config) for path, parameter in owned.items())


def _all_linear(model: nn.Module, config: PeftConfig) -> set[str]:
    """The names that PEFT's "all-linear" stands for, the same whether or not the model already has an adapter.

    They are each Linear, quantised or not, and Conv1D but the output embedding and the head of a sequence
    classifier, what their parameters are computed from, where these are parametrised, and the routers of experts.
    """
    heads = set()
    if isinstance(model, PreTrainedModel):
        heads = {model.get_output_embeddings()}
        if heads == {None} and config.task_type == TaskType.SEQ_CLS:
            heads = {next((getattr(model, name) for name in SEQ_CLS_HEAD_NAMES if hasattr(model, name)), None)}
    heads = {head.base_layer if isinstance(head, SubspaceLayer) else head for head in heads}
    linears = {
        name: module
        for name, _, _, module in base_modules(model)
        if (isinstance(module, (nn.Linear, Conv1D)) or is_packed_linear(module)) and module not in heads
    }
    computed = (other for name, module in linears.items() for other in computed_from(name, module))
    return {*linears, *computed, *routers(model)}
