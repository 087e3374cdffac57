"""Forming: origin + P theta_d is made for the operation that reads it, and made again where its backward pass does.

Autograd holds the tensors that an operation saves until its backward pass; of one that was formed here it holds how it
was formed: z and the origin, which are there anyway.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from ..coordinates import Coordinates
from ..plain_model import is_partitioned
from ..projections.recorded import is_transformed
from ..projections.scratch import is_scratch
from .modules import MATRICES, in_place_of


HELD_ENTRIES = 2**13  # a tensor of up to so many, 32 KiB, is held: forming it takes as long as a small layer
OUTER_HOOKS = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
"""Gives the hooks around ours, such as those of checkpoints; torch has it since 2.8, before which tensors are held."""


class Form:
    """How a tensor is formed: origin + P z of some adapters, or without an origin the sum of their increments.

    Args:
        terms: The coordinates and z of each adapter.
        base: The base's own tensor, of which coordinates that replace it make an increment.
        dtype: What the result is converted to; None: to that of the origin, if there is one.
    """

    def __init__(
        self,
        terms: Sequence[tuple[Coordinates, Tensor]],
        origin: Tensor | None,
        base: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ):
        self.terms, self.origin, self.base, self.dtype = terms, origin, base, dtype

    def __call__(self) -> Tensor:
        total = self.origin
        for coordinates, z in self.terms:
            if self.origin is not None:
                z = z.to(torch.promote_types(z.dtype, total.dtype))
                if total is self.origin or not coordinates.replaces:
                    total = coordinates.moved_from(total, z)
                    continue
            increment = coordinates.increment(z)
            increment = increment - self.base if coordinates.replaces else increment
            total = increment if total is None else total + increment
        total = total if self.origin is None else total.to(self.origin.dtype)
        return total if self.dtype is None else total.to(self.dtype)

    def frozen(self) -> Form:
        """The same without graphs, whatever is set, switched or merged later."""
        terms = [(copy.copy(coordinates), z.detach()) for coordinates, z in self.terms]
        tensors = (None if x is None or is_partitioned(x) else x.detach() for x in (self.origin, self.base))
        form = Form(terms, *tensors, self.dtype)
        if self.origin is not None and form.origin is None:
            form.origin = self.origin  # DeepSpeed gathers it anew for the backward pass
        return form


class FormedAgain:
    """A tensor that was formed, as autograd holds it: its form, and what it looked like.

    An operation may save it many times, as a recurrent network does at each step. Then it is kept from its first use
    in a backward pass until another tensor is formed, or the backward pass ends.
    """

    def __init__(self, form: Form, like: Tensor):
        self.form = form.frozen()
        self.stride, self.dtype, self.version = like.stride(), like.dtype, _version(like)
        sources = (self.form.origin, self.form.base, *(z for _, z in self.form.terms))
        self.sources = [(x, _version(x)) for x in sources if x is not None and not is_partitioned(x)]
        self.uses = 0

    def __call__(self) -> Tensor:
        last = _last[0]
        if last is not None and last[0] is self:
            return last[1]
        for source, version in self.sources:
            check_version(source, version)
        _forget()
        with torch.no_grad():
            tensor = self.form()
            if tensor.stride() != self.stride:  # small tensors that were formed together are laid out as the origin
                tensor = tensor.new_empty_strided(tensor.shape, self.stride).copy_(tensor)
        if self.uses > 1 and is_in_backward():
            Variable._execution_engine.queue_callback(_forget)
            _last[0] = self, tensor
        return tensor


_last: list[tuple[FormedAgain, Tensor] | None] = [None]
"""In a list, because threads that replace a class's attribute at once break its cache."""


def _forget() -> None:
    _last[0] = None


def is_in_backward() -> bool:
    """Not so where somebody looks at what a node has saved."""
    return torch._C._current_graph_task_id() != -1


def check_version(tensor: Tensor, version: int) -> None:
    """What torch checks of tensors that it saves without hooks.

    Raises:
        RuntimeError: if the tensor was written to since it had this version.
    """
    if _version(tensor) != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"a tensor of shape {list(tensor.shape)} is at version {_version(tensor)}; expected version {version} "
            "instead; write to it after the backward pass, or to a copy."
        )


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class _Hooks:
    """While a module runs, formed tensors are saved by their form, all others as without these hooks."""

    def __init__(self, forms: dict[str, Form], tensors: dict[str, Tensor]):
        self.formed = {
            tensors[path].untyped_storage()._cdata: FormedAgain(form, tensors[path]) for path, form in forms.items()
        }
        self.outer = OUTER_HOOKS(False)

    def find(self, tensor: Tensor) -> FormedAgain | None:
        """How it was formed, if it was, and was not written to since."""
        formed = self.formed.get(tensor.untyped_storage()._cdata) if type(tensor) is Tensor else None
        is_as_formed = formed and (tensor.dtype, _version(tensor)) == (formed.dtype, formed.version)
        return formed if is_as_formed else None

    def pack(self, tensor: Tensor) -> Callable[[], Tensor]:
        formed = self.find(tensor)
        if formed is not None:
            formed.uses += 1
            return _View(formed, tensor)
        if self.outer is not None:
            return _Outer(self.outer[0](tensor), self.outer[1])
        return _Held(tensor)


class _View:
    def __init__(self, formed: FormedAgain, tensor: Tensor):
        self.formed, self.layout = formed, (tensor.shape, tensor.stride(), tensor.storage_offset())

    def __call__(self) -> Tensor:
        return self.formed().as_strided(*self.layout)


class _Outer:
    def __init__(self, packed: object, unpack: Callable[[object], Tensor]):
        self.packed, self.unpack = packed, unpack

    def __call__(self) -> Tensor:
        return self.unpack(self.packed)


class _Held:
    def __init__(self, tensor: Tensor):
        self.tensor = tensor if tensor.is_leaf else tensor.detach()  # its graph would hold it in a circle
        self.version = _version(tensor)

    def __call__(self) -> Tensor:
        check_version(self.tensor, self.version)
        return self.tensor


class _Product(torch.autograd.Function):
    """x Wᵀ + b, or x W + b if `transposed`.

    The gradient of W is written over W, which was formed for that of x, if nothing else has saved it.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, transposed, formed):
        ctx.transposed, ctx.formed = transposed, formed
        ctx.save_for_backward(x, weight if ctx.needs_input_grad[0] else None)
        weight = weight if transposed else weight.t()
        rows = x.flatten(0, -2)
        y = torch.mm(rows, weight) if bias is None else torch.addmm(bias, rows, weight)
        return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], weight.shape[1]])  # a caller may not write to a view

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        to_x = to_weight = to_bias = None
        if ctx.needs_input_grad[0]:
            to_x = grad @ (weight.t() if ctx.transposed else weight)
        if ctx.needs_input_grad[2]:
            to_bias = grad.flatten(0, -2).sum(0)
        if ctx.needs_input_grad[1]:
            left, right = (x, grad) if ctx.transposed else (grad, x)
            is_free = weight is not None and ctx.formed is not None and ctx.formed.uses == 1
            is_free = is_free and not torch.is_grad_enabled() and not is_transformed()
            out = weight.detach() if is_free and weight.is_contiguous() else None
            to_weight = torch.mm(left.flatten(0, -2).t(), right.flatten(0, -2), out=out)
        return to_x, to_weight, to_bias, None, None


def _product(module: nn.Module, hooks: _Hooks, *args, **kwargs) -> Tensor:
    """The forward of a module that multiplies by its weight, which is formed."""
    x, weight, bias = args[0] if args else next(iter(kwargs.values())), module.weight, module.bias
    is_plain = type(x) is Tensor and x.dim() > 1 and x.layout == torch.strided and x.dtype == weight.dtype
    is_autocast = torch.is_autocast_enabled(weight.device.type) or torch.autograd.forward_ad._current_level >= 0
    is_plain = is_plain and (bias is None or bias.dtype == x.dtype)
    if not is_plain or is_autocast or not weight.requires_grad:
        return type(module).forward(module, *args, **kwargs)
    return _Product.apply(x, weight, bias, MATRICES[type(module).forward], hooks.find(weight))


@contextmanager
def formed(module: nn.Module, forms: dict[str, Form], others: dict[str, Tensor] | None = None):
    """Run `module` with tensors of these forms, by name, in place of its parameters; yields these.

    Args:
        others: Tensors that are in place of further parameters.
    """
    tensors = {path: form() for path, form in forms.items()}
    in_place = {**tensors, **(others or {})}  # torch 2.7 cannot trace |
    large = {}
    if torch.is_grad_enabled() and not is_transformed() and _has_hooks():
        large = {path: forms[path] for path, x in tensors.items() if x.numel() > HELD_ENTRIES and _can_return(x)}
    if not large:
        with in_place_of(module, in_place):
            yield tensors
        return
    hooks, forward = _Hooks(large, tensors), {}
    if type(module).forward in MATRICES and "forward" not in module.__dict__ and "weight" in large:
        forward = {"forward": partial(_product, module, hooks)}
    try:
        with torch.autograd.graph.saved_tensors_hooks(hooks.pack, _unpack), in_place_of(module, in_place | forward):
            yield tensors
    finally:
        hooks.formed.clear()  # their memory may be that of others next, and the graph holds these hooks


def _unpack(packed: Callable[[], Tensor]) -> Tensor:
    return packed()


def _has_hooks() -> bool:
    return OUTER_HOOKS is not None and torch._C._autograd._saved_tensors_hooks_is_enabled()


def _can_return(tensor: Tensor) -> bool:
    """Whether the same memory can be made again: not that of a cache, of which the tensor is a part."""
    if type(tensor) is not Tensor or tensor.device.type == "meta" or tensor.is_complex():
        return False
    storage = tensor.untyped_storage()
    return storage.nbytes() == tensor.numel() * tensor.itemsize or is_scratch(storage)
