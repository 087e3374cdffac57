"""Modules: which of them are linear in their parameters, and running one with other tensors in their place."""

from __future__ import annotations

import contextlib
import itertools
import threading
import warnings
from functools import partial
from inspect import unwrap
from types import MethodType
from weakref import WeakKeyDictionary

import torch
from accelerate.utils import has_offloaded_params
from peft.tuners.tuners_utils import _get_in_out_features
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..plain_model import shape_of
from .caches import has_cache, renew


LINEAR_IN_PARAMETERS = {
    *(kind.forward for kind in (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)),
    *(kind.forward for kind in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)),
}
"""The forward methods that are linear in weight and bias; a subclass may have another that is not."""


MATRICES = {nn.Linear.forward: False, Conv1D.forward: True}
"""Forward methods that multiply by the weight, or by its transpose -> whether the weight is [inputs, outputs]."""


def is_linear_in_parameters(module: nn.Module) -> bool:
    """Whether its operation is linear in weight and bias, and it stores these rather than computing them."""
    if module._parameters.get("weight") is None or not set(module._parameters) <= {"weight", "bias"}:
        return False
    if isinstance(module, nn.EmbeddingBag):
        return type(module).forward is nn.EmbeddingBag.forward and module.mode != "max"
    if isinstance(module, nn.Embedding) and type(module).__name__.endswith("ScaledWordEmbedding"):
        return True  # many models of transformers have a class of this name: an embedding times a constant
    return type(module).forward in LINEAR_IN_PARAMETERS


def autocast_dtype(module: nn.Module, parameter: Tensor) -> torch.dtype | None:
    """The dtype to which autocast converts a weight or input of a module linear in its parameters, if it does."""
    device = parameter.device.type
    if not torch.is_autocast_enabled(device) or parameter.dtype != torch.float32:
        return None
    return None if isinstance(module, nn.Embedding | nn.EmbeddingBag) else torch.get_autocast_dtype(device)


def padding_row(module: nn.Module, path: str) -> int | None:
    """The row of a parameter that the module never trains: that of an embedding's `padding_idx`."""
    if path != "weight" or not isinstance(module, nn.Embedding | nn.EmbeddingBag) or module.padding_idx is None:
        return None
    return module.padding_idx % shape_of(module.weight)[0]


def features(module: nn.Module) -> tuple[int | None, int | None]:
    """PEFT's numbers of inputs and outputs, where it knows the kind of module."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unsupported layer type")  # PEFT's list; every module is supported here
        try:
            return _get_in_out_features(module)
        except (ValueError, AttributeError):  # keys or values of another size; another library's class of a known name
            return None, None


def device_of(module: nn.Module) -> torch.device:
    """The device of its tensors, or to which accelerate loads those that it offloaded when the module runs."""
    device = next(itertools.chain(module.parameters(), module.buffers())).device
    is_elsewhere = device.type == "meta" and has_offloaded_params(module)
    return torch.device(module._hf_hook.execution_device) if is_elsewhere else device


_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
"""Apart from the modules, which are copied and pickled."""


def alone(module: nn.Module) -> contextlib.AbstractContextManager:
    """Until it is left, no other thread runs this module: one would find the tensors that are in place of its own."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _locks.setdefault(module, threading.RLock())


OF_ACCELERATE = "_old_forward"
"""Where accelerate keeps a module's forward, to run it between hooks that move or load what it needs."""


def has_hooks(module: nn.Module) -> bool:
    """Whether others see its inputs or outputs when it is called."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks)


def has_own_forward(module: nn.Module) -> bool:
    """Whether the module has been given another forward than that of its class, beside hooks of accelerate's."""
    given = module.__dict__.get(OF_ACCELERATE, module.__dict__.get("forward"))
    return given is not None and getattr(given, "__func__", None) is not type(module).forward


class _StandIn:
    """A module with other tensors in place of some parameters, as its forward sees it."""

    sparse = False  # as below

    def __init__(self, module: nn.Module, tensors: dict[str, Tensor]):
        object.__setattr__(self, "_of", module)  # torch 2.8 can trace this, but no update of __dict__
        for name, tensor in tensors.items():
            object.__setattr__(self, name, tensor)

    def __getattr__(self, name: str):
        found = getattr(self.__dict__["_of"], name)
        is_own = isinstance(found, MethodType) and found.__self__ is self.__dict__["_of"]
        return partial(found.__func__, self) if is_own else found  # it may read these tensors too

    def __setattr__(self, name: str, value):
        setattr(self.__dict__["_of"], name, value)


def has_stand_in(module: nn.Module) -> bool:
    """Whether `run_with` may run it: a module of torch or transformers without children, hooks or a cache.

    Nor may its forward call `super()`, which takes no stand-in.
    """
    if module._modules or "forward" in module.__dict__ or isinstance(module, nn.RNNBase):
        return False
    if has_hooks(module) or has_cache(module):
        return False
    if not type(module).__module__.startswith(("torch.nn.modules.", "transformers.")):
        return False
    forward = unwrap(type(module).forward)
    return hasattr(forward, "__code__") and "__class__" not in forward.__code__.co_freevars


def run_with(module: nn.Module, tensors: dict[str, Tensor], *args, **kwargs):
    """Run `module` with these tensors in place of its parameters, without writing to it.

    torch.compile lets nothing inside a checkpoint be written to.
    """
    return type(module).forward(_StandIn(module, tensors), *args, **kwargs)


@contextlib.contextmanager
def in_place_of(module: nn.Module, tensors: dict[str, Tensor]):
    """Run `module` with these tensors, by name, in place of its parameters.

    Each becomes an instance attribute, which hides the parameter of that name. `torch.func.functional_call` would
    exchange the parameters, without effect where FSDP has set instance attributes of its own.
    """
    with alone(module):
        hidden, attributes = [], module.__dict__
        if getattr(module, "sparse", False):  # an embedding; torch cannot pass sparse gradients on to a dense theta_d
            tensors = {**tensors, "sparse": False}
        for name, tensor in tensors.items():
            hidden.append((name, attributes.get(name)))
            attributes[name] = tensor
        if isinstance(module, nn.RNNBase):  # it reads its parameters from a list
            names = module._flat_weights_names
            flat = [tensors.get(name, weight) for name, weight in zip(names, module._flat_weights, strict=True)]
            hidden.append(("_flat_weights", module._flat_weights))
            attributes["_flat_weights"] = flat
        keeps_values = has_cache(module)
        try:
            if keeps_values:
                renew(module)
            yield
        finally:
            for name, before in hidden:
                if before is None:
                    del attributes[name]
                else:
                    attributes[name] = before
            if keeps_values:
                renew(module)
