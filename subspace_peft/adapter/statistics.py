"""Statistics: what modules gather in training mode, one set for the base and one for each adapter.

These are the running means and variances of batch norms, and the singular vectors of spectral norms.

The set in use is the buffers of the base module themselves, so whoever resets, averages or removes them acts on that
of the active adapter; the other sets are kept by the layer. Each function takes a SubspaceLayer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .vectors import PREFIX


RUNNING = ("running_mean", "running_var", "num_batches_tracked")
STATISTICS = (*RUNNING, "_u", "_v", "weight_u", "weight_v")
BUFFERS = tuple(PREFIX + name for name in STATISTICS)
"""The attributes of a layer in which the adapters' statistics are: dictionaries by the adapter's name."""


def kept_by(module: nn.Module) -> list[str]:
    """The names of the statistics that a module keeps: frozen batch norms have no momentum by which to gather any."""
    gathers = hasattr(module, "momentum")
    names = [name for name in STATISTICS if gathers or name not in RUNNING]
    return [name for name in names if isinstance(module._buffers.get(name), Tensor)]


def add_buffers(layer: BaseTunerLayer) -> None:
    """Give a new layer its BUFFERS; an empty dictionary stands for a statistic that the base module does not keep."""
    kept = kept_by(layer.base_layer)
    for name, attribute in zip(STATISTICS, BUFFERS, strict=True):
        setattr(layer, attribute, BufferDict(persistent=True) if name in kept else {})
    if kept:
        layer.register_state_dict_pre_hook(_keep_those_in_use)
        layer.register_state_dict_post_hook(_give_the_bases)
        layer.register_load_state_dict_pre_hook(_begin_loading)
        layer.register_load_state_dict_post_hook(_end_loading)


def add_adapter(layer: BaseTunerLayer, adapter: str) -> None:
    """Start the adapter's statistics at the base's."""
    for name, buffers in _dictionaries(layer).items():
        if (statistic := of_base(layer, name)) is not None:
            buffers[adapter] = statistic.detach().clone()


def _dictionaries(layer: BaseTunerLayer) -> dict[str, BufferDict]:
    dictionaries = {name: getattr(layer, PREFIX + name) for name in STATISTICS}
    return {name: buffers for name, buffers in dictionaries.items() if isinstance(buffers, BufferDict)}


def of_base(layer: BaseTunerLayer, name: str) -> Tensor:
    """The base's statistic of this name, also while an adapter's is in use."""
    return layer.base_statistics.get(name, getattr(layer.base_layer, name))


def of_adapter(layer: BaseTunerLayer, adapter: str) -> dict[str, Tensor]:
    """The adapter's statistics by name; empty if the base module keeps none."""
    keep_those_in_use(layer)
    return {name: buffers[adapter] for name, buffers in _dictionaries(layer).items() if adapter in buffers}


def keyed(layer: BaseTunerLayer, names: list[str], adapter: str) -> Iterator[tuple[list[str], Tensor, Tensor]]:
    """For each statistic of the adapter its state-dict keys, one for each name of the layer, its value, the base's."""
    for statistic, value in of_adapter(layer, adapter).items():
        yield [f"{name}.{PREFIX}{statistic}.{adapter}" for name in names], value, of_base(layer, statistic)


def in_use(layer: BaseTunerLayer) -> str | None:
    """The adapter whose statistics the base module should have: the last of those that act, or None for the base's.

    The last, because an adapter that is trained on top of others comes after them.
    """
    if layer.merged_adapters:
        return layer.merged_adapters[-1]
    adapters = () if layer.disable_adapters else layer.active_adapters
    return next((adapter for adapter in reversed(adapters) if adapter in layer.coordinates), None)


def switch(layer: BaseTunerLayer, adapter: str | None) -> None:
    """Give the base module the statistics of this adapter, or its own."""
    dictionaries = _dictionaries(layer)
    if not dictionaries or layer.statistics_of == adapter:
        return
    keep_those_in_use(layer)
    for name, buffers in dictionaries.items():
        if getattr(layer.base_layer, name) is None or adapter not in (None, *buffers.keys()):
            continue  # the model does without
        if layer.statistics_of is None:
            layer.base_statistics[name] = getattr(layer.base_layer, name)
        setattr(layer.base_layer, name, layer.base_statistics.pop(name) if adapter is None else buffers[adapter])
    layer.statistics_of = adapter


def keep_those_in_use(layer: BaseTunerLayer) -> None:
    """Note the buffers of the base module as those of the adapter in use; someone may have put new ones there."""
    if layer.statistics_of is None:
        return
    for name, buffers in _dictionaries(layer).items():
        statistic = getattr(layer.base_layer, name)
        if statistic is not None and buffers[layer.statistics_of] is not statistic:
            buffers[layer.statistics_of] = statistic


def convert(layer: BaseTunerLayer, function) -> None:
    """After a conversion of the layer's tensors: the same for the base's, and one tensor again for the set in use."""
    if layer.statistics_of is None:
        return
    layer.base_statistics = {name: function(statistic) for name, statistic in layer.base_statistics.items()}
    for name, buffers in _dictionaries(layer).items():
        if getattr(layer.base_layer, name) is not None:
            setattr(layer.base_layer, name, buffers[layer.statistics_of])


@contextmanager
def using(layer: BaseTunerLayer, adapter: str | None) -> Iterator[None]:
    """The base module has the statistics of this adapter, or its own, for a while."""
    before = layer.statistics_of
    switch(layer, adapter)
    try:
        yield
    finally:
        switch(layer, before)


# The state dict holds the base's statistics under the base's names, as if no adapter were in use.


def _keep_those_in_use(layer: nn.Module, prefix: str, keep_vars: bool) -> None:
    keep_those_in_use(layer)


def _give_the_bases(layer: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict) -> None:
    for name, statistic in layer.base_statistics.items():
        state_dict[f"{prefix}base_layer.{name}"] = statistic.detach()


def _begin_loading(layer: nn.Module, *args) -> None:
    switch(layer, None)


def _end_loading(layer: nn.Module, incompatible_keys) -> None:
    switch(layer, in_use(layer))
