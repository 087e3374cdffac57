"""Projection: the rows of P that make one tensor."""

from __future__ import annotations

import dataclasses
import inspect
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .philox import Philox
from .recorded import Redrawn, is_recorded, uncounted, unrecorded


@dataclass(frozen=True)
class TensorRows:
    """Everything that the rows of P of one tensor may depend on.

    They depend on no other tensor, except through `offset` and `column`, which only identity and coordinate read.
    """

    name: str  # of the tensor in the base model, for example "layers.0.fc.weight"
    n: int  # entries of the tensor
    d: int  # entries of theta_d
    seed: int = 0
    offset: int = 0  # entries of theta before this tensor
    column: int = 0  # columns of P that belong to tensors before this one
    nnz_per_row: int | None = None
    version: int = 1  # projection_version of the adapter's config
    cache: bool = True
    shape: tuple[int, int] | None = None  # of the tensor as a matrix, which kronecker alone reads; None: [n, 1]
    given: Tensor | tuple | None = None  # basis: rows [n, d]; coordinate: sorted positions [k]; others: a saved state

    def philox(self, purpose: str) -> Philox:
        return Philox(self.seed, self.name, purpose, self.version)


def full_precision(x: Tensor):
    """Turns autocast off, which would round theta_d and every step of a transform to half precision."""
    return torch.autocast(x.device.type, enabled=False)


def to_working_dtype(x: Tensor) -> Tensor:
    """Convert half precision to float32, in which it is computed; return anything else unchanged."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


class JointCache(ABC):
    """Computes P z of several tensors at once, for projections that ask for one tensor each; z is scale * theta_d."""

    @abstractmethod
    def normalised(self, theta_d: Tensor, scale: Tensor | float) -> Tensor | None:
        """z, the same tensor from one layer to the next; None if the caller must compute it."""

    @abstractmethod
    def entries(self, z: Tensor, member: Projection) -> Tensor | None:
        """P z of one tensor, in memory that the cache owns; None if the projection must compute it alone."""


class Map(torch.autograd.Function):
    """x -> P x, or x -> P^T x. A linear map is its own derivative, and its backward pass is the transposed map."""

    @staticmethod
    def forward(x, projection, transposed):
        with full_precision(x):
            return projection.adjoint(x) if transposed else projection.apply(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.projection, ctx.transposed = inputs

    @staticmethod
    def backward(ctx, grad):
        return Map.apply(grad, ctx.projection, not ctx.transposed), None, None

    @staticmethod
    def jvp(ctx, x, *_):
        return Map.apply(x, ctx.projection, ctx.transposed)

    @staticmethod
    def vmap(info, in_dims, x, projection, transposed):
        return Map.apply(x.movedim(in_dims[0], 0), projection, transposed), 0


class _Move(torch.autograd.Function):
    """theta_d, origin -> origin + P theta_d, written into P theta_d: [n] is too much memory to take twice."""

    @staticmethod
    def forward(theta_d, origin, projection):
        with full_precision(theta_d):
            return projection.move(theta_d, origin)

    @staticmethod
    def setup_context(ctx, inputs, output):
        theta_d, origin, ctx.projection = inputs
        ctx.batch, ctx.shape, ctx.dtype = theta_d.shape[:-1], output.shape, origin.dtype

    @staticmethod
    def backward(ctx, grad):
        to_origin = grad.sum_to_size(ctx.shape[len(ctx.batch) :]).to(ctx.dtype) if ctx.needs_input_grad[1] else None
        return Map.apply(grad.reshape(*ctx.batch, -1), ctx.projection, True), to_origin, None

    @staticmethod
    def jvp(ctx, theta_d, origin, _):
        moved = 0 if theta_d is None else Map.apply(theta_d, ctx.projection, False).view(ctx.shape)
        return moved + (0 if origin is None else origin)

    @staticmethod
    def vmap(info, in_dims, theta_d, origin, projection):
        if in_dims[0] is None:
            theta_d = theta_d.expand(info.batch_size, *theta_d.shape)
        elif in_dims[0]:
            theta_d = theta_d.movedim(in_dims[0], 0)
        if in_dims[1] is None:
            return _Move.apply(theta_d, origin, projection), 0
        origin = origin.movedim(in_dims[1], 0)
        return Map.apply(theta_d, projection, False).view_as(origin) + origin, 0


# torch binds the arguments of `forward` at every call. Without a stored signature it would derive it from the source
# each time, which takes longer than a small projection.
for function in (Map, _Move):
    function.forward.__signature__ = inspect.signature(function.forward)


LAST_DRAWN: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
"""The two states drawn last without a cache: backward forms a weight, then takes Pᵀ of its bias and of itself."""


class Projection(Redrawn):
    """The rows of P of one tensor: theta = origin + P theta_d, P: [n, d], fixed.

    A final class implements two linear maps without autograd, `apply` and `adjoint`. Calling the projection is `apply`
    with derivatives of every order, for which nothing of size n is saved.

    The state of a projection is the data that the seed determines: `draw` makes it, `state` returns it. With
    `cache=False` it is drawn for every use.
    """

    VERSION = 1  # the newest projection version that this class can draw

    def __init__(self, rows: TensorRows):
        if not 1 <= rows.version <= self.VERSION:
            raise ValueError(
                f"`projection_version` must be 1 to {self.VERSION} for {type(self).__name__}, got {rows.version}; "
                "install a newer subspace_peft to load this adapter."
            )
        super().__init__()
        self.rows = rows
        self.joint_cache: JointCache | None = None

    @uncounted
    def __call__(self, theta_d: Tensor, origin: Tensor | None = None) -> Tensor:
        """P theta_d: [..., d] -> [..., n]; with an origin [*shape] of n entries their sum, [..., *shape]."""
        entries = self.joint_cache and self.joint_cache.entries(theta_d, self)
        if entries is not None and origin is not None:
            return origin + entries.view(origin.shape)
        if entries is not None:
            # Without a graph, an in-place change by the caller would reach the cache; in a graph autograd forbids it.
            return entries if entries.requires_grad else entries.clone()
        if origin is None:
            return self._map(theta_d, False)
        if is_recorded():
            with full_precision(theta_d):
                return origin + self.apply(theta_d).view((*theta_d.shape[:-1], *origin.shape))
        return _Move.apply(theta_d, origin, self)

    def transpose(self, grad: Tensor) -> Tensor:
        """P^T grad: [..., n] -> [..., d]."""
        return self._map(grad, True)

    @abstractmethod
    def apply(self, theta_d: Tensor) -> Tensor:
        """P theta_d: [..., d] -> [..., n], without derivatives; the result is new memory."""

    def move(self, theta_d: Tensor, origin: Tensor) -> Tensor:
        """origin + P theta_d, without derivatives: [..., d] -> [..., *shape]; the result is new memory."""
        entries = self.apply(theta_d)
        return torch.ops.aten._unsafe_view(entries, (*theta_d.shape[:-1], *origin.shape)).add_(origin)  # no view

    @abstractmethod
    def adjoint(self, grad: Tensor) -> Tensor:
        """P^T grad: [..., n] -> [..., d], without derivatives."""

    @abstractmethod
    def column_square_norms(self) -> Tensor:
        """sum_i P_ij^2 over the rows of this tensor, exact: float64 [d] on the CPU."""

    def square_norm(self) -> float:
        """sum_ij P_ij^2 over the rows of this tensor, exact."""
        return self.column_square_norms().sum().item()

    @classmethod
    def together(cls, projections: Sequence[Projection]) -> JointCache | None:
        """A cache that computes P theta_d of several of these tensors at once; None where that is not faster."""
        return None

    @property
    def has_product(self) -> bool:
        """Whether `product` gives x (P z)ᵀ without the tensor P z, a matrix."""
        return False

    @property
    def moved(self) -> int:
        """The number of rows that are not zero."""
        return self.rows.n

    @property
    def state_bytes(self) -> int:
        """About how many bytes the state takes."""
        return 0

    def draw(self, device: torch.device) -> tuple[Tensor, ...]:
        """Draw the state: what apply and adjoint need and the seed determines. Empty unless a class overrides it."""
        return ()

    def philox(self, purpose: str) -> Philox:
        return self.rows.philox(purpose)

    def _held(self, device: torch.device) -> tuple[Tensor, ...]:
        drawn = self._drawn.get(device)
        if drawn is None and (last := LAST_DRAWN.get(self)) is not None and last[0] == device:
            return last[1]
        return self._draw(device) if drawn is None else drawn

    def _draw(self, device: torch.device) -> tuple[Tensor, ...]:
        with unrecorded():
            given = self.rows.given
            drawn = tree_map(lambda x: x.to(device), given) if isinstance(given, tuple) else self.draw(device)
        if self.rows.cache:
            if device.type != "cpu":  # drop the state on the CPU, which only the column norms needed
                self._drawn.pop(torch.device("cpu"), None)
            self._drawn[device] = drawn
        else:
            for oldest in list(LAST_DRAWN)[:-1]:
                LAST_DRAWN.pop(oldest, None)
            LAST_DRAWN[self] = device, drawn
        return drawn

    def _map(self, x: Tensor, transposed: bool) -> Tensor:
        if is_recorded():
            with full_precision(x):
                return self.adjoint(x) if transposed else self.apply(x)
        return Map.apply(x, self, transposed)

    def __repr__(self) -> str:
        rows = dataclasses.replace(self.rows, given=None)
        return f"{type(self).__name__}({rows})"
