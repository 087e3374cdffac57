"""Walk: finding the layers, vectors and coordinates of the adapters in a model."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..coordinates import Coordinates
from ..plain_model import COMPILED
from .layer import SubspaceLayer
from .vectors import SubspaceVectors


def find_vectors(model: nn.Module) -> SubspaceVectors:
    return next(module for module in model.modules() if isinstance(module, SubspaceVectors))


def named_layers(model: nn.Module) -> Iterator[tuple[str, SubspaceLayer]]:
    """Each layer with its name; once for each of its names if it has several."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, SubspaceLayer):
            yield name.removeprefix("_fsdp_wrapped_module."), module


def unique_coordinates(model: nn.Module, adapter: str) -> dict[str, Coordinates]:
    """The coordinates of each target tensor by its name, once, however many layers hold it."""
    return {
        coordinates.name: coordinates
        for _, layer in named_layers(model)
        for coordinates in layer.coordinates.get(adapter, {}).values()
    }


def uncompiled(key: str) -> str:
    """The key as it is where neither the model nor a module in it is compiled."""
    return ".".join(part for part in key.split(".") if part != COMPILED)


def plain(key: str) -> str:
    """The key as it is where no other adapter wraps a module around this one."""
    return key.replace(".base_layer.", ".")
