"""Outside: what others read from the base module of a layer, run on it and set on it.

Models read attributes of their submodules, and call other methods than forward. They get what the moved module would
give them. Each function takes a SubspaceLayer.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .mixed_batch import is_mixed
from .modules import alone, in_place_of
from .reading import MovedTensor, MovingBySample, read, refuse_by_sample


OF_WRAPPERS = ("__", "_hf_", "_old_forward", "ds_", "pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt")
"""How names begin that Python, accelerate and DeepSpeed look for on each module separately."""
OF_THE_BASE = ("weight", "bias")
"""Attributes that PEFT gives a layer too; they are the base module's all the same."""


def get(layer: BaseTunerLayer, name: str) -> Any:
    """The attribute of the base module as the acting adapters move it: a parameter, a method, a property."""
    base, adapters = layer.base_layer, layer.acting()
    with alone(base):
        if any(name in layer.coordinates[adapter] for adapter in adapters):
            return read(layer, name, adapters) if not is_mixed(layer) else MovedTensor(MovingBySample(layer, name, {}))
        if adapters and isinstance(getattr(type(base), name, None), property):
            with _moved_base(layer, adapters)():
                return getattr(base, name)
        value = getattr(base, name)
    if adapters and isinstance(value, types.MethodType) and value.__self__ is base:
        method = functools.partial(run, layer, name)
        return method if torch.compiler.is_compiling() else functools.wraps(value)(method)
    return value


def run(layer: BaseTunerLayer, method: str, *args, **kwargs) -> Any:
    """What a method of the base module returns with the moved tensors in place; each step, if it is a generator."""
    with alone(layer.base_layer):
        moved_base = _moved_base(layer, layer.acting())
    with moved_base():
        result = getattr(layer.base_layer, method)(*args, **kwargs)
    return _steps(result, moved_base) if isinstance(result, types.GeneratorType) else result


def _steps(generator: Generator, moved_base: Callable[[], AbstractContextManager]) -> Generator:
    while True:
        with moved_base():
            try:
                value = next(generator)
            except StopIteration:
                return
        yield value


def _moved_base(layer: BaseTunerLayer, adapters: list[str]) -> Callable[[], AbstractContextManager]:
    if is_mixed(layer):
        refuse_by_sample(layer)
    paths = dict.fromkeys(path for adapter in adapters for path in layer.coordinates[adapter])
    return functools.partial(in_place_of, layer.base_layer, {path: read(layer, path, adapters) for path in paths})


def is_of_the_base(layer: BaseTunerLayer, name: str) -> bool:
    """Whether who sets this attribute means the base module: the base has one of this name, the layer has none.

    The base has those it had when it was wrapped, those of its class, those set on it through the layer, and those
    that the code of its class names, as its forward may make one. Any other was set by a library that sets it on every
    module, and on the base itself.
    """
    base = layer.__dict__.get("_modules", {}).get("base_layer")
    if base is None or name.startswith(OF_WRAPPERS):
        return False
    is_known = name in layer.names_of_the_base or name in base._parameters or _names(type(base), name)
    if not is_known and (name in base.__dict__ or not hasattr(base, name)):
        return False
    own = layer.__dict__, layer._modules, layer._parameters, layer._buffers
    return name in OF_THE_BASE or not (hasattr(type(layer), name) or any(name in names for names in own))


_in_code: WeakKeyDictionary[type, dict[str, bool]] = WeakKeyDictionary()


@torch.compiler.assume_constant_result  # a traced one would read dictionaries that the graph changes
def _names(kind: type, name: str) -> bool:
    """Whether a class has this attribute, or its code, or that of one that it derives from, names it."""
    if hasattr(kind, name):
        return True
    found = _in_code.setdefault(kind, {})
    if name not in found:
        members = [member for each in kind.__mro__ if each not in nn.Module.__mro__ for member in vars(each).values()]
        found[name] = any(_is_in_code(name, code) for member in members for code in _codes(member))
    return found[name]


def _codes(member: object) -> list[types.CodeType]:
    functions = (member.fget, member.fset, member.fdel) if isinstance(member, property) else (member,)
    unwrapped = (inspect.unwrap(getattr(f, "__func__", f)) for f in functions if f is not None)
    return [f.__code__ for f in unwrapped if isinstance(f, types.FunctionType)]


def _is_in_code(name: str, code: types.CodeType) -> bool:
    inner = (each for each in code.co_consts if isinstance(each, types.CodeType))
    return name in code.co_names or name in code.co_consts or any(_is_in_code(name, each) for each in inner)


def set_on_base(layer: BaseTunerLayer, name: str, value: Any) -> None:
    """Set an attribute of the base module.

    Raises:
        ValueError: if an adapter moves the parameter of this name, whose origin would be lost.
    """
    base = layer.base_layer
    if not any(name in coordinates for coordinates in layer.coordinates.values()):
        setattr(base, name, value)
        layer.names_of_the_base.add(name)
        return
    of_the_base = value.source.parameter if isinstance(value, MovedTensor) else value  # as tied tensors are
    if of_the_base is not getattr(base, name):
        raise ValueError(
            f"A parameter that an adapter moves must stay the same, `{name}` of {type(base).__name__} was given "
            "another; tie, resize or replace it before the model is wrapped, or unload the adapter first."
        )
