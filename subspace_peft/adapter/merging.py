"""Merging: adding the increments of adapters to the parameters of a base module, and taking them away again.

Each function takes a SubspaceLayer. A tensor that several layers hold is merged by the first of them alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..plain_model import is_distributed
from . import quantised


def check_known(field: str, adapters: list[str] | None, known: Iterable[str]) -> None:
    """Check that adapters that a user names are there.

    Raises:
        ValueError: if one is not; PEFT would go on without it.
    """
    names = () if adapters is None or isinstance(adapters, str) else adapters
    if unknown := [name for name in names if name not in known]:
        there = ", ".join(known)
        raise ValueError(f"`{field}` must be adapters of the model, got {unknown[0]!r}; it has {there}.")


def check_whole(layer: BaseTunerLayer) -> None:
    """Check that the parameters which adapters move are whole.

    Raises:
        ValueError: if FSDP or DeepSpeed holds a part of one in each process.
    """
    for path, coordinates in (moved for paths in layer.coordinates.values() for moved in paths.items()):
        parameter = getattr(layer.base_layer, path)
        if is_distributed(parameter) or quantised.shape_of(layer.base_layer, path) != coordinates.shape:
            raise ValueError(
                f"A tensor must be whole to merge an adapter into it or out of it, `{coordinates.name}` is sharded; "
                "save the adapter, and merge it in one process into the base that it was trained on."
            )


def merge(layer: BaseTunerLayer, adapters: list[str], safe: bool) -> None:
    """Add the increments of these adapters; a plain Linear takes the place of a quantised one whose weight moves.

    Raises:
        ValueError: if more than one merged adapter would replace a weight, or a parameter is sharded; with `safe` also
            if a merged parameter would not be finite. The adapter at fault is not merged then, and those before it
            stay merged.
    """
    check_whole(layer)
    layer.held([*layer.merged_adapters, *adapters])
    if _moves_weight(layer, adapters):
        quantised.dequantise(layer)
    try:
        _add(layer, adapters, safe)
    finally:
        if not _moves_weight(layer, layer.merged_adapters):
            quantised.restore(layer)


def _moves_weight(layer: BaseTunerLayer, adapters: list[str]) -> bool:
    return any("weight" in layer.coordinates[adapter] for adapter in adapters)


def _add(layer: BaseTunerLayer, adapters: list[str], safe: bool) -> None:
    origins = {adapter: _origins(layer, adapter) for adapter in adapters}  # before any parameter changes
    for adapter in adapters:
        before = layer.replaced_origins
        layer.replaced_origins = origins[adapter] | before
        if safe and not all(merged.isfinite().all() for _, merged in _merged(layer, adapter)):
            layer.replaced_origins = before
            raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
        for parameter, merged in _merged(layer, adapter):
            parameter.data = merged.to(parameter.dtype)
        layer.merged_adapters.append(adapter)


def unmerge(layer: BaseTunerLayer) -> None:
    """Take away the increments of all merged adapters.

    Raises:
        ValueError: if a parameter is sharded.
    """
    check_whole(layer)
    while layer.merged_adapters:
        adapter = layer.merged_adapters.pop()
        for parameter, increment in _owned_increments(layer, adapter):
            parameter.data = (parameter - increment).to(parameter.dtype)
    quantised.restore(layer)
    for path, origin in layer.replaced_origins.items():  # to the last bit, which subtraction would round
        parameter = getattr(layer.base_layer, path)
        if not quantised.is_quantised(parameter):  # else it was a plain one, now gone, whose weight was replaced
            parameter.data = origin.to(parameter.device)
    layer.replaced_origins = {}


def _origins(layer: BaseTunerLayer, adapter: str) -> dict[str, Tensor]:
    """The parameters, by path, that come back to the last bit, without what is merged into them.

    They are those that merging this adapter replaces, and the bias of a quantised module.
    """
    origins = {}
    for path, coordinates in layer.coordinates[adapter].items():
        if path in layer.merged_elsewhere[adapter]:
            continue
        parameter = getattr(layer.base_layer, path)
        if coordinates.replaces:
            increment = layer.increments(layer.merged_adapters).get(path, torch.zeros_like(parameter))
            origins[path] = (parameter - increment.to(parameter.device)).to(parameter.dtype)
        elif quantised.is_quantised_linear(layer.base_layer):
            origins[path] = parameter.data
    return origins


def _merged(layer: BaseTunerLayer, adapter: str) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Each parameter that this layer merges, and its sum with the increment."""
    return ((parameter, parameter + increment) for parameter, increment in _owned_increments(layer, adapter))


def _owned_increments(layer: BaseTunerLayer, adapter: str) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """The parameters that this layer merges, and their increments; one is formed after the other."""
    for path, zs in layer.zs([adapter], skip=layer.merged_elsewhere[adapter]).items():
        parameter = getattr(layer.base_layer, path)
        yield parameter, layer.form(path, zs, None)().to(parameter.device)
