"""The weights of a model as matrices, under their names in the plain model, with what adapters add to them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from ..adapter.layer import SubspaceLayer
from ..adapter.quantised import dequantised, is_quantised, is_quantised_linear
from ..plain_model import WRAPPERS, unwrapped, whole


Names = str | Iterable[str] | None
Increment = Callable[[], Tensor]


@torch.no_grad()
def matrices(model: nn.Module | Mapping[str, Tensor], names: Names = None) -> Iterator[tuple[str, Tensor]]:
    """Each weight, one at a time, as a matrix of its first dimension by the rest, under its name in the plain model.

    If adapters of PEFT move a weight, it is W_0 plus the increment of the active adapters, in the wider of their
    dtypes: those of this package (origin + P theta_d), and those of every type with `get_delta_weight`, such as LoRA.
    For a module in `modules_to_save` it is the active copy. A tied tensor comes once. Iterate on every process,
    because sharded tensors are gathered.

    Args:
        model: A model, plain or in PEFT, DDP, FSDP, torch.compile; or tensors by name.
        names: A regular expression for the whole name, or names; all matrices if left out.

    Raises:
        ValueError: if no matrix has such a name, or an adapter has no `get_delta_weight`.
    """
    entries = _weights(model) if isinstance(model, nn.Module) else {name: (w, None) for name, w in model.items()}
    entries = {name: entry for name, entry in entries.items() if _is_matrix(entry[0])}
    for name in _chosen(list(entries), names):
        tensor, increment = entries[name]
        tensor = dequantised(tensor) if isinstance(tensor, nn.Module) else whole(tensor.detach())
        if increment is not None:
            tensor = tensor + increment().to(tensor.device)
        yield name, tensor.reshape(len(tensor), -1)


def _is_matrix(entry: Tensor | nn.Module) -> bool:
    """Whether it is a floating tensor of two dimensions or more with entries, or a module with a quantised weight."""
    if isinstance(entry, nn.Module):
        return True
    return entry.ndim >= 2 and entry.numel() > 0 and entry.is_floating_point() and not is_quantised(entry)


def _chosen(known: list[str], names: Names) -> list[str]:
    if names is None:
        chosen, unknown = known, []
    elif isinstance(names, str):
        chosen, unknown = [name for name in known if re.fullmatch(names, name)], [names]
    else:
        chosen = list(names)
        unknown = [name for name in chosen if name not in known]
    if not known:
        raise ValueError("A model must have weights that are matrices to have spectra, this one has none.")
    if not chosen or (unknown and not isinstance(names, str)):
        raise ValueError(
            f"`names` must name matrices of the model, {unknown!r} names none; it has {len(known)}: "
            f"{', '.join(known[:6])}{', ...' if len(known) > 6 else ''}."
        )
    return chosen


def _weights(model: nn.Module) -> dict[str, tuple[Tensor | nn.Module, Increment | None]]:
    """The parameters by their plain names, or the modules of quantised ones, and what adapters add to them."""
    weights: dict[str, tuple[Tensor | nn.Module, Increment | None]] = {}
    increments: dict[str, Increment] = {}
    seen = set()

    def visit(module: nn.Module, prefix: str) -> None:
        module = module.get_base_model() if isinstance(module, PeftModel) else module
        module = module.model if isinstance(module, BaseTuner) else module
        if isinstance(module, ModulesToSaveWrapper) and module.active_adapters and not module.disable_adapters:
            module = module.modules_to_save[module.active_adapters[0]]
        elif isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        if isinstance(module, BaseTunerLayer):
            increments.update({prefix + path: increment for path, increment in _increments(module).items()})
            module = module.get_base_layer()
        for name, parameter in module._parameters.items():
            path = prefix + name
            key = (id(parameter), path in increments)  # a tied tensor may be moved under only one of its names
            if parameter is not None and key not in seen:
                seen.add(key)
                is_stored = name == "weight" and is_quantised_linear(module)
                weights[path] = (module if is_stored else parameter, increments.get(path))
        for name, child in module._modules.items():
            if child is not None:
                visit(child, WRAPPERS.sub("", f"{prefix}{name}.").lstrip("."))

    visit(unwrapped(model), "")
    return weights


def _increments(layer: BaseTunerLayer) -> dict[str, Increment]:
    """What the active adapters add to the tensors of a layer, by path inside the base module; nothing if merged."""
    if layer.merged or layer.disable_adapters:
        return {}
    if isinstance(layer, SubspaceLayer):
        adapters = [adapter for adapter in layer.active_adapters if adapter in layer.coordinates]
        paths = {path for adapter in adapters for path in layer.coordinates[adapter]}
        return {path: partial(_subspace_increment, layer, adapters, path, paths) for path in paths}
    adapters = [a for a in layer.active_adapters if any(a in getattr(layer, n, ()) for n in layer.adapter_layer_names)]
    return {"weight": partial(_delta_weight, layer, adapters)} if adapters else {}


def _subspace_increment(layer: SubspaceLayer, adapters: list[str], path: str, paths: set[str]) -> Tensor:
    return layer.increments(adapters, skip=paths - {path})[path]


def _delta_weight(layer: BaseTunerLayer, adapters: list[str]) -> Tensor:
    if not callable(getattr(layer, "get_delta_weight", None)):
        raise ValueError(
            f"An adapter must have `get_delta_weight` for spectra of its weights, {type(layer).__name__} has none; "
            "merge it first, or leave its weights out of `names`."
        )
    return sum(layer.get_delta_weight(adapter) for adapter in adapters)
