"""Root: the base model of an adapter, whose children are what they were.

SubspaceVectors is a module of the base model: its parameters, state dict and conversions include theta_d. But models
iterate over their children, and users slice nn.Sequential. So the class of an adapted root is one that leaves the
vectors out of these, and SubspaceModel has them among its own children, because sharding finds modules so. A root
without a SubspaceModel around it, which `inject_adapter_in_model` makes, shows them among its children.
"""

from __future__ import annotations

import copyreg
import functools
from typing import Any

import torch
from torch import nn

from ..plain_model import unwrapped
from .caches import has_cache, renew
from .layer import SubspaceLayer
from .vectors import VECTORS, SubspaceVectors


CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
READERS = ("__len__", "__iter__", "__getitem__", "__contains__", "keys", "items", "values")
WRITERS = ("__delitem__", "insert", "clear")


class Root(nn.Module):
    """What the class of an adapted root adds to that of the base model."""

    def named_children(self):
        return (_without_vectors(self) if self.hides_vectors else super()).named_children()

    def get_parameter(self, target):
        """As in torch: of a layer its base module's, which transformers' tie_weights ties to itself."""
        path, _, name = target.rpartition(".")
        if isinstance(layer := self.get_submodule(path), SubspaceLayer) and name in layer.base_layer._parameters:
            target = f"{path}.base_layer.{name}"
        return super().get_parameter(target)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.hides_vectors:
            self._modules[VECTORS]._apply(fn)
        return self

    def train(self, mode=True):
        super().train(mode)
        self._modules[VECTORS].train(mode)
        return self

    def __reduce_ex__(self, protocol):
        function, arguments, *state = super().__reduce_ex__(protocol)
        if function is copyreg.__newobj__ and arguments == (type(self),):
            return _new, (type(self).plain,), *state
        return function, arguments, *state


@functools.cache
def _class_of_root(plain: type[nn.Module]) -> type[nn.Module]:
    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    methods = {
        name: make(name)
        for make, of_containers in ((_reader, READERS), (_writer, WRITERS))
        for name in of_containers
        if any(getattr(plain, name, None) is getattr(container, name, 0) for container in CONTAINERS)
    }
    return type(plain.__name__, (Root, plain), {**names, **methods, "plain": plain})


def _reader(name: str):
    def read(self, *args):
        return getattr(type(self).plain, name)(_without_vectors(self), *args)

    return read


def _writer(name: str):
    def write(self, *args):
        vectors = self._modules.pop(VECTORS)
        try:
            return getattr(type(self).plain, name)(self, *args)
        finally:
            self._modules[VECTORS] = vectors

    return write


def _without_vectors(root: nn.Module) -> nn.Module:
    """The same module under its own class, without the vectors: not a copy, for reading only."""
    plain = object.__new__(type(root).plain)
    plain.__dict__ = root.__dict__ | {"_modules": {k: m for k, m in root._modules.items() if k != VECTORS}}
    return plain


def _new(plain: type[nn.Module]) -> nn.Module:
    return object.__new__(_class_of_root(plain))


def add_vectors(model: nn.Module, vectors: SubspaceVectors) -> None:
    """Make the vectors a module of the base model, but not one of its children; of the one inside, if compiled."""
    model = unwrapped(model)
    model.add_module(VECTORS, vectors)
    model.__class__ = _class_of_root(type(model))
    model.hides_vectors = False
    _know_modules(model, vectors)
    # First: a copy of the model has them before its layers, the first of which would own them otherwise.
    attributes = dict(model.__dict__)
    model.__dict__.clear()
    model.__dict__.update({"vectors_of_layers": attributes.pop("vectors_of_layers"), **attributes})
    model.register_forward_pre_hook(_before_forward)


def remove_vectors(model: nn.Module) -> None:
    model = unwrapped(model)
    for module in model.modules_with_cache:
        renew(module)
    del model._modules[VECTORS], model.hides_vectors, model.vectors_of_layers, model.modules_with_cache
    model.__class__ = type(model).plain
    for key, hook in list(model._forward_pre_hooks.items()):
        if hook is _before_forward:
            del model._forward_pre_hooks[key]


def _know_modules(root: nn.Module, vectors: SubspaceVectors) -> None:
    """Keep what each forward needs, in lists: they are no second modules of these names."""
    root.vectors_of_layers = [vectors]
    root.modules_with_cache = [module for module in root.modules() if has_cache(module)]


def _before_forward(root: nn.Module, args: Any) -> None:
    """Renew what modules keep; hand the root's vectors to its layers, where the root is a copy made module by module.

    Such copies, of meta-learning and of nn.DataParallel, know only modules; the reference of a layer to its vectors
    would remain that to the original's.
    """
    vectors = root._modules[VECTORS]
    if not torch.compiler.is_compiling():  # a number that changes would have each forward compiled anew
        vectors.forwards += 1
    if root.vectors_of_layers[0] is not vectors:
        for module in root.modules():
            if isinstance(module, SubspaceLayer):
                object.__setattr__(module, "vectors", vectors)
        _know_modules(root, vectors)
    for module in root.modules_with_cache:
        renew(module)
