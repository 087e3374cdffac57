"""Statistics: the running means and variances of batch norms, one set for the base and one for each adapter.

Training with an adapter changes the adapter's set and leaves the base's as it is. Each function takes a SubspaceLayer.
"""

from __future__ import annotations

from collections.abc import Iterator

from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from .vectors import PREFIX


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
BUFFERS = tuple(PREFIX + name for name in STATISTICS)
"""The attributes of a layer in which the adapters' statistics are: dictionaries by the adapter's name."""


def add_buffers(layer: BaseTunerLayer) -> None:
    """Give a new layer its BUFFERS; an empty dictionary stands for a statistic that the base module does not keep."""
    for name, attribute in zip(STATISTICS, BUFFERS, strict=True):
        is_kept = isinstance(getattr(layer.base_layer, name, None), Tensor)
        setattr(layer, attribute, BufferDict(persistent=True) if is_kept else {})


def add_adapter(layer: BaseTunerLayer, adapter: str) -> None:
    """Start the adapter's statistics at the base's."""
    for name, attribute in zip(STATISTICS, BUFFERS, strict=True):
        buffers = getattr(layer, attribute)
        if isinstance(buffers, BufferDict):
            buffers[adapter] = of_base(layer, name).detach().clone()


def of_base(layer: BaseTunerLayer, name: str) -> Tensor:
    """The base's statistic of this name, also while an adapter is merged."""
    return layer.base_statistics.get(name, getattr(layer.base_layer, name))


def of_adapter(layer: BaseTunerLayer, adapter: str) -> dict[str, Tensor]:
    """The adapter's statistics by name; empty if the base module keeps none."""
    dictionaries = {name: getattr(layer, PREFIX + name) for name in STATISTICS}
    return {name: buffers[adapter] for name, buffers in dictionaries.items() if adapter in buffers}


def keyed(layer: BaseTunerLayer, names: list[str], adapter: str) -> Iterator[tuple[list[str], Tensor]]:
    """For each statistic of the adapter its state-dict keys, one for each name of the layer, and the base's value."""
    for statistic in of_adapter(layer, adapter):
        yield [f"{name}.{PREFIX}{statistic}.{adapter}" for name in names], of_base(layer, statistic)


def merge(layer: BaseTunerLayer, adapter: str) -> None:
    """Write the adapter's statistics into the base module; the layer keeps the base's."""
    for name, statistic in of_adapter(layer, adapter).items():
        buffer = getattr(layer.base_layer, name)
        layer.base_statistics.setdefault(name, buffer.clone())
        buffer.copy_(statistic)


def unmerge(layer: BaseTunerLayer) -> None:
    """Give the base module its own statistics back."""
    for name, statistic in layer.base_statistics.items():
        getattr(layer.base_layer, name).copy_(statistic)
    layer.base_statistics = {}
