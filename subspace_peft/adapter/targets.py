"""Targets: which tensors of a model are theta, chosen and checked before anything is touched."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable
from dataclasses import dataclass

from accelerate.utils import has_offloaded_params
from peft import PeftConfig
from peft.tuners.tuners_utils import _ExcludedModule
from torch import nn
from torch.nn.parameter import is_lazy

from ..plain_model import COMPILED, is_distributed, is_partitioned, shape_of
from . import statistics
from .base_modules import asked_for, base_modules, computed_from, own_parameters, owned_or_read
from .config import OF_ONE_DIMENSION
from .modules import is_linear_in_parameters
from .quantised import check_not_packed, is_quantised, is_quantised_linear
from .saved_whole import check_saved, is_saved_whole


@dataclass(frozen=True)
class Target:
    """One module to adapt: where it is in the model, and which of its parameters are theta."""

    parent: nn.Module
    child: str
    module: nn.Module
    tensors: dict[str, str]  # path inside the module -> name of the tensor, from which P is drawn
    merged_elsewhere: frozenset[str]  # the paths whose tensor an earlier target holds too
    stacked: frozenset[str]  # the paths of tensors [experts, ., .] that low-rank coordinates take matrix by matrix

    @property
    def layer(self) -> nn.Module:
        """The module itself, or the SubspaceLayer that an earlier adapter put around it."""
        return self.parent._modules[self.child]


def find_targets(
    model: nn.Module, config: PeftConfig, matches: Callable[[str], bool], rename: Callable[[str], str]
) -> list[Target]:
    """The modules that the config names, those that share a tensor with them, and those that keep statistics.

    Args:
        matches: Whether the config names the module of this name.
        rename: The name that P is drawn from for a tensor of this name.

    Raises:
        ValueError: if a named module owns no parameters, or none of `config.parameters`, or holds them sharded or in a
            dtype that cannot move; or if a name in `config.target_parameters` is that of no parameter.
    """
    check_saved(model, config)
    modules = [entry for entry in base_modules(model) if not is_saved_whole(entry[0], config)]
    if any(child == "_fsdp_wrapped_module" for _, _, child, _ in modules):
        raise ValueError(
            "A target tensor must be whole when an adapter is added, but the model is in FSDP, which flattens its "
            "tensors; add the adapter first, FSDP afterwards."
        )
    named = _named_paths(modules, config, rename)
    chosen = _chosen_paths(modules, config, matches, rename, named)
    first_names = {}  # a tied tensor goes by the first of its names
    for name, _, _, module in base_modules(model, saved=True):
        for path, parameter in own_parameters(module).items():
            first_names.setdefault(id(parameter), f"{name}.{path}")
    theta = {id(own_parameters(module)[path]) for name, _, _, module in modules for path in chosen.get(name, ())}

    targets, held, places = [], set(), set()
    for name, parent, child, module in modules:
        if (id(parent), child) in places:
            continue
        places.add((id(parent), child))
        parameters = {path: p for path, p in own_parameters(module).items() if id(p) in theta}
        if parameters and child == COMPILED:
            raise ValueError(
                f"A target must not be compiled by itself, `{name}` is; compile it after the model is wrapped."
            )
        if parameters or statistics.kept_by(module):
            merged_elsewhere = set()
            for path, p in parameters.items():
                if id(p) in held:
                    merged_elsewhere.add(path)
                held.add(id(p))
            names = {path: rename(first_names[id(p)]) for path, p in parameters.items()}
            stacked = {path for path in named.get(name, ()) if path in parameters and _is_stack(module, path)}
            targets.append(Target(parent, child, module, names, frozenset(merged_elsewhere), frozenset(stacked)))
    return targets if theta else []


def _is_stack(module: nn.Module, path: str) -> bool:
    """Whether the tensor is a matrix for each entry of its first dimension, and not the weight of a convolution."""
    return len(shape_of(own_parameters(module)[path])) == 3 and not is_linear_in_parameters(module)


def _named_paths(modules, config: PeftConfig, rename: Callable[[str], str]) -> dict[str, list[str]]:
    """For each module, the paths of the parameters that `target_parameters` names, by their last parts as in LoRA."""
    asked, paths, found, known = set(config.target_parameters or ()), {}, set(), set()
    if not asked:
        return {}
    for name, _, _, module in modules:
        for path in own_parameters(module):
            full = rename(f"{name}.{path}")
            known.add(full)
            if names := {target for target in asked if f".{full}".endswith(f".{target}")}:
                paths.setdefault(name, []).append(path)
                found |= names
    unknown = sorted(asked - found)
    if unknown and config.expected_fingerprint is None:
        near = difflib.get_close_matches(unknown[0], sorted(known), 3, 0.3) or sorted(known)[:3]
        raise ValueError(
            f"`target_parameters` must name parameters by their last parts, and of a module inside the model: none is "
            f"called `{unknown[0]}`; names near to it: {', '.join(near)}."
        )
    return paths


def _chosen_paths(
    modules,
    config: PeftConfig,
    matches: Callable[[str], bool],
    rename: Callable[[str], str],
    named: dict[str, list[str]],
) -> dict[str, list[str]]:
    """For each module that the config names, the paths of the parameters that are theta.

    Args:
        named: The paths that `target_parameters` names, whatever `parameters` says.
    """
    chosen, empty, known = {}, [], set()
    by_name = {name: module for name, _, _, module in modules}
    for name, _, _, module in modules:
        if name in named:  # a stack of weights or biases goes by those names too
            known |= {*own_parameters(module), "weight", "bias"}
        if not matches(name):
            if name in named:
                chosen[name] = chosen.get(name, []) + named[name]
                _check_tensors(name, module, {path: own_parameters(module)[path] for path in named[name]}, config)
            continue
        check_not_packed(name, module)
        owned = owned_or_read(name, by_name, config, rename)
        known |= set(owned)
        paths = list(owned)
        if config.parameters is not None:
            paths = [path for path in owned if asked_for(path, owned[path], config) or path in named.get(name, ())]
        if config.parameters in (None, OF_ONE_DIMENSION):
            _check_computed(name, module, config, matches)
        if not paths:
            empty.append(name)
            continue
        _check_tensors(name, module, {path: owned[path] for path in paths}, config)
        for path in paths:
            child, _, own = path.rpartition(".")
            chosen.setdefault(f"{name}.{child}" if child else name, []).append(own)
    _check_parameters(config, known)
    if empty and (not chosen or (config.expected_fingerprint is None and _are_named(config, empty))):
        what = f"parameters named {sorted(config.parameters)}" if config.parameters else "parameters"
        what = "parameters of one dimension" if config.parameters == OF_ONE_DIMENSION else what
        raise ValueError(
            f"A target module must own {what}: `{empty[0]}` owns none; name modules that do, or use "
            'target_modules="all", which leaves out those that do not.'
        )
    return chosen


def _check_computed(name: str, module: nn.Module, config: PeftConfig, matches: Callable[[str], bool]) -> None:
    """Check that a parametrised module is not trained without what its parameters are computed from."""
    computed = computed_from(name, module)
    if config.parameters == OF_ONE_DIMENSION:
        computed = [each for each in computed if getattr(module, each.rpartition(".")[2]).dim() == 1]
    missing = [each for each in computed if not matches(each)]
    if missing and config.expected_fingerprint is None:
        raise ValueError(
            f"A parametrised target must be named with what its parameters are computed from, `{name}` is without "
            f"`{missing[0]}`; add that to `target_modules`, or choose others by `parameters`, such as ['bias']."
        )


def _check_tensors(name: str, module: nn.Module, parameters: dict[str, nn.Parameter], config: PeftConfig) -> None:
    if getattr(module, "max_norm", None) is not None:
        raise ValueError(
            f"A target must leave its weight alone, but the embedding `{name}` rewrites its weight by `max_norm`; set "
            "that to None or exclude the module."
        )
    for path, parameter in parameters.items():
        _check_whole(f"{name}.{path}", parameter, config)
        if is_lazy(parameter):
            raise ValueError(
                f"A target tensor must have a shape, but `{name}.{path}` of a {type(module).__name__} gets one at the "
                "first forward; run the model once before it is wrapped."
            )
        if parameter.is_complex():
            raise ValueError(
                f"A target tensor must be real: `{name}.{path}` is {parameter.dtype}; leave the module out with "
                "`exclude_modules`, or hold real and imaginary part as one real parameter (torch.view_as_real)."
            )
        is_runnable = path == "weight" and is_quantised_linear(module)
        is_float = parameter.is_floating_point() and parameter.dtype.itemsize > 1 and not is_quantised(parameter)
        if not (is_float or is_runnable):
            raise ValueError(
                f"A quantised target must be a Linear of bitsandbytes or torchao: `{name}.{path}` is a "
                f"{type(parameter).__name__} of {parameter.dtype} in a {type(module).__name__}; load the model with "
                "that module unquantised, or leave it out with `exclude_modules`."
            )


def _check_whole(name: str, parameter: nn.Parameter, config: PeftConfig) -> None:
    if config.replace_weight and is_partitioned(parameter):
        raise ValueError(
            f"A weight must be whole to be replaced: `{name}` is partitioned by DeepSpeed's ZeRO-3, as in every model "
            "loaded after TrainingArguments with ZeRO-3; use ZeRO-2, which keeps the frozen weights whole, or FSDP2."
        )
    if is_distributed(parameter):
        raise ValueError(
            f"A target tensor must be whole when an adapter is added: `{name}` is a DTensor; add the adapter before "
            "FSDP2's fully_shard, and load the model without `tp_plan`."
        )


def _check_parameters(config: PeftConfig, known: set[str]) -> None:
    """Check the names in `config.parameters`, except of a saved adapter, which its fingerprint checks."""
    if config.parameters in (None, OF_ONE_DIMENSION) or not known or config.expected_fingerprint is not None:
        return
    unknown = sorted(set(config.parameters) - known)
    if not unknown:
        return
    near = difflib.get_close_matches(unknown[0], sorted(known), 3, 0.5) or sorted(known)[:3]
    raise ValueError(
        f"`parameters` must name parameters that a target owns, none owns `{unknown[0]}`; names near to it: "
        f"{', '.join(near)}."
    )


def _are_named(config: PeftConfig, names: list[str]) -> bool:
    """Whether `target_modules` lists one of these names, rather than matching it by a pattern."""
    return not isinstance(config.target_modules, str) and bool(set(names) & set(config.target_modules or ()))


def is_named(match: object) -> bool:
    """Whether PEFT's answer for a module is that a config names it."""
    return bool(match) and not isinstance(match, _ExcludedModule)


def refuse_all(
    model: nn.Module, config: PeftConfig, answer: Callable[[PeftConfig, str], object], rename: Callable[[str], str]
) -> None:
    """Say why a config has no targets in the model, where more is known than that none was found, as PEFT says.

    Args:
        answer: PEFT's answer to whether a config names the module of this name.
    """

    def named(**changes: None) -> list[str]:
        lenient = copy.copy(config)
        for field, value in changes.items():
            setattr(lenient, field, value)
        return [name for name, *_ in base_modules(model) if is_named(answer(lenient, rename(name)))]

    if config.exclude_modules and not named() and named(exclude_modules=None):
        raise ValueError(
            f"`exclude_modules` must leave a module that `target_modules` = {config.target_modules} names, "
            f"{config.exclude_modules} leaves none; exclude fewer."
        )
    if config.modules_to_save and (saved := named(modules_to_save=None)):
        raise ValueError(
            f"A target must not be one of `modules_to_save`, to which every module belongs whose name ends so: "
            f"{config.modules_to_save} take `{saved[0]}`; write longer names, or leave one of the two out."
        )
    names = {name for name, *_ in base_modules(model)} | {child for _, _, child, _ in base_modules(model)}
    asked = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules or ()
    near = sorted({near for target in asked for near in difflib.get_close_matches(target, names, 3, 0.5)})
    if near:
        raise ValueError(
            f"Target modules {config.target_modules} not found in the base model; names near to it: {', '.join(near)}."
        )


def refuse_ties_apart(model: nn.Module, targets: list[Target]) -> None:
    """Accelerate makes two tensors of a tied one that it offloads.

    Raises:
        ValueError: if a target is one of them, since P has rows for one tensor.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for target in targets:
        apart = {*target.tensors.values()} & {*tied, *tied.values()}
        if apart and has_offloaded_params(target.module):
            raise ValueError(
                f"A tied tensor must be one to be adapted, but accelerate offloads `{min(apart)}` as several; leave "
                "its modules out of `target_modules`, or keep them on a device in `device_map`."
            )
