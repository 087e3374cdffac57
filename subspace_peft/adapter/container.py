"""Container: the layer around a target that others index, count and iterate over, such as nn.ParameterList."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

from torch import nn

from . import outside
from .layer import SubspaceLayer
from .vectors import SubspaceVectors


class ContainerLayer(SubspaceLayer):
    """Gives the items of its base module, with the moved tensors among them.

    Python looks for these methods on the class: a plain layer has none of them, as nn.Module has none.
    """

    def __bool__(self) -> bool:
        return bool(self.base_layer)

    def __len__(self) -> int:
        return len(self.base_layer)

    def __contains__(self, item: Any) -> bool:
        return item in self.base_layer

    def __getitem__(self, key: Any) -> Any:
        """The item; a list for a slice of nn.ParameterList, which would hold copies."""
        base = self.base_layer
        if isinstance(base, nn.ParameterList):
            if isinstance(key, slice):
                return [self[i] for i in range(len(base))[key]]
            return getattr(self, base._get_abs_string_index(key))
        if isinstance(base, nn.ParameterDict) and key in base:
            return getattr(self, base._key_to_attr(key))
        return outside.run(self, "__getitem__", key)

    def __iter__(self) -> Iterator:
        return outside.run(self, "__iter__") if hasattr(self.base_layer, "__iter__") else self._indexed()

    def _indexed(self) -> Iterator:
        for i in count():
            try:
                item = self[i]
            except IndexError:
                return
            yield item


CONTAINERS = ("__getitem__", "__iter__", "__len__", "__contains__")
"""A module that has one of these methods is a container."""


def layer_around(module: nn.Module, vectors: SubspaceVectors) -> SubspaceLayer:
    is_container = any(hasattr(module, method) for method in CONTAINERS)
    return (ContainerLayer if is_container else SubspaceLayer)(module, vectors)
