"""Walk: finding what an adapter has put into a model."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..coordinates import Coordinates
from .layer import SubspaceLayer
from .vectors import SubspaceVectors


PREFIX = "subspace_peft_"
VECTORS = "subspace_vectors"
"""The child of the base model that holds theta_d. The name must not contain the prefix: PEFT skips such modules."""


def find_vectors(model: nn.Module) -> SubspaceVectors:
    return next(module for module in model.modules() if isinstance(module, SubspaceVectors))


def named_layers(model: nn.Module) -> Iterator[tuple[str, SubspaceLayer]]:
    """Each layer by its name; by all of them where it has several."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, SubspaceLayer):
            yield name.removeprefix("_fsdp_wrapped_module."), module


def unique_coordinates(model: nn.Module, adapter: str) -> dict[str, Coordinates]:
    """The coordinates of each target tensor once, however many layers hold it."""
    return {
        coordinates.name: coordinates
        for _, layer in named_layers(model)
        for coordinates in layer.coordinates.get(adapter, {}).values()
    }


def plain(key: str) -> str:
    """A key as if no other adapter had wrapped a module around this one."""
    return key.replace(".base_layer.", ".")
