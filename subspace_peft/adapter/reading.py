"""Reading: a target's own parameter, read from outside the module, is origin + P theta_d.

Models read `child.weight` for fused projections, tied output layers, position tables and state-space kernels, and most
of all for its dtype. So what they read is made at the first operation that uses its entries.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from ..plain_model import is_partitioned
from ..projections.recorded import is_transformed, uncounted
from . import forming, quantised


class MovedTensor(Tensor):
    """origin + P theta_d of one parameter, computed when its entries are first used.

    It has the shape, dtype and device of the parameter. Under autograd it is differentiable as any tensor is. It can
    not be written to, but what changes no entry may run: models clamp weights that are within their bounds.

    Raises:
        RuntimeError: if its entries are written to, because that would change neither the origin nor theta_d.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, source: Moving | Part):
        like = source.like
        return Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=source.device
        )

    def __init__(self, source: Moving | Part):
        self.source = source

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].source)
        kwargs = kwargs or {}
        if written := _written(func, args, kwargs):
            return _write(func, args, kwargs, written)
        if func.is_view:
            return _views(func, args, kwargs)
        args, kwargs = tree_map_only(cls, lambda value: value.source.entries(), (args, kwargs))
        return func(*args, **kwargs)

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise RuntimeError(self.source.refusal())

    def plain(self) -> Tensor:
        """The same as a tensor in memory: for what looks at memory rather than run operations."""
        return self.clone()

    def numpy(self, *args, **kwargs):
        return self.plain().numpy(*args, **kwargs)

    def __array__(self, *args, **kwargs):
        return self.plain().__array__(*args, **kwargs)

    def __dlpack__(self, *args, **kwargs):
        return self.plain().__dlpack__(*args, **kwargs)

    def tolist(self):
        return self.plain().tolist()

    def data_ptr(self):
        return self.source.entries().data_ptr()

    def untyped_storage(self):
        return self.source.entries().untyped_storage()

    def __deepcopy__(self, memo):
        return self.plain().__deepcopy__(memo)

    def __reduce_ex__(self, protocol):
        return self.plain().__reduce_ex__(protocol)

    def __repr__(self, *args, **kwargs):
        return f"MovedTensor({self.plain()!r})"


class Moving:
    """How one parameter of a SubspaceLayer moves, at one value of theta_d.

    Args:
        zs: The normalised theta_d of each adapter that moves the parameter.
    """

    def __init__(self, layer: BaseTunerLayer, path: str, zs: dict[str, Tensor]):
        self.layer, self.path, self.zs = layer, path, zs
        self.parameter = getattr(layer.base_layer, path)
        like = quantised.like(layer) if quantised.is_quantised(self.parameter) else self.parameter
        self.like, self.device = _shape_of(like), self.parameter.device
        self.state = _state(layer, self.parameter)
        self._formed_again = forming.FormedAgain(layer.form(path, zs, self.parameter), self.like)
        self._entries: Tensor | None = None

    def __call__(self, parameter: Tensor, *zs: Tensor) -> Tensor:
        if is_partitioned(parameter):  # it may not be whole now; the gradients of z do not depend on its entries
            parameter = parameter.new_zeros(()).expand(self.like.shape)
        return self.layer.form(self.path, dict(zip(self.zs, zs, strict=True)), parameter)()

    def entries(self) -> Tensor:
        """The moved tensor without its graph; a large one is formed by each operation that uses it."""
        if self._entries is not None:
            return self._entries
        entries = self._formed_again()
        if entries.numel() <= forming.HELD_ENTRIES:
            self._entries = entries
        return entries

    @uncounted
    def is_of(self, parameter: Tensor, zs: dict[str, Tensor]) -> bool:
        """Whether this is how the parameter moves by these zs."""
        return (
            parameter is self.parameter
            and _state(self.layer, parameter) == self.state
            and list(zs) == list(self.zs)
            and all(
                one is other or (one.dtype == other.dtype and torch.equal(one, other))
                for one, other in zip(zs.values(), self.zs.values(), strict=True)
            )
        )

    def refusal(self) -> str:
        kind = type(self.layer.base_layer).__name__
        name = self.layer.coordinates[next(iter(self.zs))][self.path].name
        return (
            f"A parameter that an adapter moves must not be written to, `{self.path}` of {kind} is computed; write to "
            "that of its `base_layer`, the origin, or merge or unload the adapter first. If the model writes to it, "
            f"leave it out of what is adapted: `{name}`."
        )


class Part:
    """A view of what was moved, such as a row or the transposed tensor; it can not be written to either.

    Args:
        view: Makes it of the entries.
        like: Its shape, strides and dtype.
    """

    def __init__(self, whole: Moving | Part, view: Callable[[], Tensor], like: Tensor):
        self.refusal, self.device, self.entries, self.like = whole.refusal, whole.device, view, like


def _written(func: Callable, args: tuple, kwargs: dict) -> list[Tensor]:
    """The tensors to which an operation writes, if a moved one is among them."""
    places = [
        args[i] if i < len(args) else kwargs.get(argument.name)
        for i, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    written = [value for value in tree_leaves(places) if isinstance(value, Tensor)]
    return written if any(isinstance(value, MovedTensor) for value in written) else []


def _write(func: Callable, args: tuple, kwargs: dict, written: list[Tensor]) -> Any:
    """What the operation returns if it leaves all entries as they are.

    Raises:
        RuntimeError: if it changes one, or more than moved tensors are written to, or the result is random.
    """
    refusal = next(value for value in written if isinstance(value, MovedTensor)).source.refusal()
    if torch.Tag.nondeterministic_seeded in func.tags or not all(isinstance(value, MovedTensor) for value in written):
        raise RuntimeError(refusal)
    moved = {id(value): value for value in tree_leaves((args, kwargs)) if isinstance(value, MovedTensor)}
    before = {key: value.source.entries() for key, value in moved.items()}
    copies = {key: entries.clone() for key, entries in before.items()}
    args, kwargs = tree_map_only(MovedTensor, lambda value: copies[id(value)], (args, kwargs))
    result = func(*args, **kwargs)
    if not all(torch.equal(copies[id(value)], before[id(value)]) for value in written):
        raise RuntimeError(refusal)
    warnings.warn(f"This write changes nothing now, and is refused where it does: {refusal}", stacklevel=2)
    originals = {id(copies[key]): value for key, value in moved.items()}
    return tree_map_only(Tensor, lambda value: originals.get(id(value), value), result)


def _views(func: Callable, args: tuple, kwargs: dict) -> Any:
    """The views that an operation gives of moved tensors, whose entries are not made for it."""
    whole = next(value for value in tree_leaves((args, kwargs)) if isinstance(value, MovedTensor)).source

    def run(of: Callable[[Moving | Part], Tensor]) -> Any:
        plain_args, plain_kwargs = tree_map_only(MovedTensor, lambda value: of(value.source), (args, kwargs))
        return func(*plain_args, **plain_kwargs)

    likes, structure = tree_flatten(run(lambda source: source.like))
    parts = [
        Part(whole, lambda at=at: tree_leaves(run(lambda source: source.entries()))[at], like)
        for at, like in enumerate(likes)
    ]
    return tree_unflatten([MovedTensor(part) for part in parts], structure)


def _shape_of(tensor: Tensor) -> Tensor:
    """A tensor with its shape, strides and dtype, and no entries."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


class MovingBySample(Moving):
    """How a parameter moves that each sample of a batch moves differently: only shape, dtype and device are known."""

    def entries(self) -> Tensor:
        refuse_by_sample(self.layer)


def refuse_by_sample(layer: BaseTunerLayer) -> NoReturn:
    raise ValueError(
        f"`adapter_names` needs modules that the model calls, but it reads {type(layer.base_layer).__name__}, which "
        "the adapters of its samples move differently; run such a batch one adapter at a time, with set_adapter, or "
        "leave the module out of `target_modules`."
    )


class Reads(dict[str, MovedTensor]):
    """The parameters of a layer that were read last, by path; a copy of the layer has read nothing."""

    def __deepcopy__(self, memo: dict) -> Reads:
        return Reads()

    def __reduce__(self):
        return Reads, ()


class _Read(torch.autograd.Function):
    """parameter, z of each adapter -> the moved tensor, of which only the graph is made.

    Its backward pass is that of moving the parameter anew, to any order. Nothing is saved, so that reading again while
    checkpointed activations are recomputed leaves their number as it is.
    """

    @staticmethod
    def forward(ctx, moving, parameter, *zs):
        ctx.moving, ctx.inputs = moving, (parameter, *zs)
        return MovedTensor(moving)

    @staticmethod
    def backward(ctx, grad):
        ctx.moving.layer.reads.pop(ctx.moving.path, None)  # its graph may be freed after this
        grad = grad.to_dense() if grad.is_sparse else grad
        with torch.enable_grad():
            moved = ctx.moving(*ctx.inputs)
        wanted = [x for x, needed in zip(ctx.inputs, ctx.needs_input_grad[1:], strict=True) if needed]
        grads = iter(torch.autograd.grad(moved, wanted, grad, create_graph=torch.is_grad_enabled()))
        return None, *(next(grads) if needed else None for needed in ctx.needs_input_grad[1:])


def read(layer: BaseTunerLayer, path: str, adapters: list[str]) -> Tensor:
    """A parameter as these adapters move it; the same tensor again while z, a tensor of its own, and the graph are.

    Where a graph is traced or transformed by torch.func it is a plain tensor.
    """
    zs = {adapter: layer.normalised(adapter) for adapter in adapters if path in layer.coordinates[adapter]}
    parameter = getattr(layer.base_layer, path)
    if is_transformed() or torch.autograd.forward_ad._current_level >= 0:
        return layer.form(path, zs, parameter)()
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (parameter, *zs.values()))
    if not trains:
        return MovedTensor(Moving(layer, path, zs))
    last = layer.reads.get(path)
    if last is None or not last.source.is_of(parameter, zs):
        last = _Read.apply(Moving(layer, path, zs), parameter, *zs.values())
        if not any(isinstance(z, nn.Parameter) for z in zs.values()):  # theta_d itself may change in place
            layer.reads[path] = last
    return last


def _state(layer: BaseTunerLayer, parameter: Tensor) -> tuple:
    """What changes when a parameter is converted or written to, or, if that is by its `data`, at the next forward."""
    version = 0 if parameter.is_inference() else parameter._version
    return parameter.dtype, parameter.device, version, layer.vectors.forwards
