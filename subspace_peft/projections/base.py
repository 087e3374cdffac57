"""Projection: the rows of P that make one tensor."""

from __future__ import annotations

import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .philox import Philox


@dataclass(frozen=True)
class TensorRows:
    """Everything that the rows of P of one tensor may depend on.

    None of it depends on the other tensors, but for `offset` and `column`, which only identity and coordinate read.
    """

    name: str  # of the tensor in the base model, for example "layers.0.fc.weight"
    n: int  # entries of the tensor
    d: int
    seed: int = 0
    offset: int = 0  # entries of theta before this tensor
    column: int = 0  # columns of P that belong to tensors before this one
    nnz_per_row: int | None = None
    version: int = 1  # projection_version of the adapter's config
    cache: bool = True
    given: Tensor | tuple | None = None  # basis: rows [n, d]; coordinate: sorted positions [k]; else: a saved state


def full_precision(x: Tensor):
    """Without autocast, which would round theta_d and every step of a transform to half precision."""
    return torch.autocast(x.device.type, enabled=False)


class JointCache(ABC):
    """P z of several tensors made at once, of which one asks for its own; z is theta_d normalised."""

    @abstractmethod
    def normalised(self, theta_d: Tensor, scale: Tensor | float) -> Tensor | None:
        """z, where it is kept from one layer to the next."""

    @abstractmethod
    def piece(self, z: Tensor, member: Projection) -> Tensor | None:
        """P z of one tensor, in memory that is kept; None where it is to be made alone."""


class Map(torch.autograd.Function):
    """x -> P x, or x -> P^T x. Its derivative is itself and its adjoint is itself the other way round."""

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
    """theta_d, origin -> origin + P theta_d, in the memory of P theta_d: [n] is too much to hold twice."""

    @staticmethod
    def forward(theta_d, origin, projection):
        with full_precision(theta_d):
            moved = projection.apply(theta_d)
        return moved.view((*theta_d.shape[:-1], *origin.shape)).add_(origin)

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


# torch binds the arguments of `forward` at each call; finding its signature would take longer than a small projection
for function in (Map, _Move):
    function.forward.__signature__ = inspect.signature(function.forward)


class Projection(ABC):
    """The rows of P of one tensor: theta = origin + P theta_d, P: [n, d], fixed.

    A final class gives two linear maps that know nothing of autograd, `apply` and `adjoint`; calling the projection
    is `apply` with derivatives of every order, for which nothing of size n is saved.

    What can be redrawn from the seed is the state: drawn when first needed, on the device that asks (the numbers are
    the same on each), dropped when pickled or copied, and with `cache=False` never kept.
    """

    VERSION = 1  # the newest projection version that this class can draw

    def __init__(self, rows: TensorRows):
        if not 1 <= rows.version <= self.VERSION:
            raise ValueError(
                f"`projection_version` must be 1 to {self.VERSION} for {type(self).__name__}, got {rows.version}; "
                "install a newer subspace_peft to load this adapter."
            )
        self.rows = rows
        self.joint_cache: JointCache | None = None
        self._drawn: dict[torch.device, tuple[Tensor, ...]] = {}

    def __call__(self, theta_d: Tensor, origin: Tensor | None = None) -> Tensor:
        """P theta_d: [..., d] -> [..., n]; with an origin [*shape] of n entries their sum, [..., *shape]."""
        piece = self.joint_cache and self.joint_cache.piece(theta_d, self)
        if piece is not None and origin is not None:
            return origin + piece.view(origin.shape)
        if piece is not None:
            return piece if piece.requires_grad else piece.clone()  # autograd guards what is cut from a graph
        if origin is None:
            return self._map(theta_d, False)
        if torch.compiler.is_compiling():
            with full_precision(theta_d):
                return origin + self.apply(theta_d).view(*theta_d.shape[:-1], *origin.shape)
        return _Move.apply(theta_d, origin, self)

    def transpose(self, grad: Tensor) -> Tensor:
        """P^T grad: [..., n] -> [..., d]."""
        return self._map(grad, True)

    @abstractmethod
    def apply(self, theta_d: Tensor) -> Tensor:
        """P theta_d: [..., d] -> [..., n], without derivatives, in memory of its own."""

    @abstractmethod
    def adjoint(self, grad: Tensor) -> Tensor:
        """P^T grad: [..., n] -> [..., d], without derivatives."""

    @abstractmethod
    def column_square_norms(self) -> Tensor:
        """sum_i P_ij^2 over the rows of this tensor, exact: float64 [d] on the CPU."""

    @classmethod
    def together(cls, projections: Sequence[Projection]) -> JointCache | None:
        """What makes P theta_d of several of these tensors at once, if that is faster."""
        return None

    @property
    def moved(self) -> int:
        """How many rows are not zero."""
        return self.rows.n

    def draw(self, device: torch.device) -> tuple[Tensor, ...]:
        """What apply and adjoint need and the seed gives; the base has none."""
        return ()

    def philox(self, purpose: str) -> Philox:
        return Philox(self.rows.seed, self.rows.name, purpose, self.rows.version)

    def state(self, device: torch.device) -> tuple[Tensor, ...]:
        """The drawn state on `device`."""
        drawn = self._drawn.get(device)
        return self._draw(device) if drawn is None else drawn

    @torch.compiler.disable
    def _draw(self, device: torch.device) -> tuple[Tensor, ...]:
        # A tensor made in inference mode could not be used in training later.
        with torch.inference_mode(False), torch.no_grad():
            given = self.rows.given
            drawn = tree_map(lambda x: x.to(device), given) if isinstance(given, tuple) else self.draw(device)
        if self.rows.cache:
            if device.type != "cpu":  # there it was drawn for the column norms
                self._drawn.pop(torch.device("cpu"), None)
            self._drawn[device] = drawn
        return drawn

    def _map(self, x: Tensor, transposed: bool) -> Tensor:
        if torch.compiler.is_compiling():  # a Function with a jvp cannot be traced; these operations can
            with full_precision(x):
                return self.adjoint(x) if transposed else self.apply(x)
        return Map.apply(x, self, transposed)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_drawn": {}}

    def __repr__(self) -> str:
        rows = dataclasses.replace(self.rows, given=None)
        return f"{type(self).__name__}({rows})"


def working(x: Tensor) -> Tensor:
    """x in the dtype to compute in: half precision is computed in float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
