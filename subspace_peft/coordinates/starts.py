"""Starts: the factors of a low-rank tensor at theta_d = 0."""

from __future__ import annotations

import copy
from abc import abstractmethod
from dataclasses import dataclass
from math import prod, sqrt
from typing import Self

import torch
from torch import Tensor

from ..projections.philox import Philox
from ..projections.recorded import Redrawn, uncounted, unrecorded


Factors = tuple[Tensor | None, ...]
"""B and A, or U, W and V; None stands for zero."""

OUTER = (".U", ".V")
"""The suffixes of the outer two of three factors."""


@dataclass(frozen=True)
class FactorShapes:
    """The shapes of the factors of one tensor, read as a matrix of its first dimension by the rest.

    A stack of matrices has a stack of each factor.
    """

    rows: int
    columns: int
    rank: int
    factors: int = 2  # 2: B A; 3: U W V with W [rank, rank]
    stack: tuple[int, ...] = ()  # the dimensions before those of the matrices

    @classmethod
    def of(cls, tensor: tuple[int, ...], rank: int, factors: int, is_stacked: bool = False) -> FactorShapes:
        stack, matrix = (tensor[:1], tensor[1:]) if is_stacked else ((), tensor)
        return cls(matrix[0], prod(matrix[1:]), rank, factors, tuple(stack))

    @property
    def parts(self) -> dict[str, tuple[int, ...]]:
        """Suffix -> shape of each factor, from left to right."""
        if self.factors == 2:
            shapes = {".B": (self.rows, self.rank), ".A": (self.rank, self.columns)}
        else:
            shapes = {".U": (self.rows, self.rank), ".W": (self.rank, self.rank), ".V": (self.rank, self.columns)}
        return {suffix: (*self.stack, *shape) for suffix, shape in shapes.items()}


class Start(Redrawn):
    """The factors of one tensor at theta_d = 0, drawn from the seed or computed from the base's weight.

    Args:
        name: The name of the tensor in the base model.
        scaling: alpha / rank, which multiplies the product of the factors.
    """

    replaces = True
    """Whether the product takes the place of the weight, or is added to it."""

    def __init__(self, name: str, shapes: FactorShapes, scaling: float, seed: int, version: int):
        super().__init__()
        self.name, self.shapes, self.scaling = name, shapes, scaling
        self._seed, self._version = seed, version
        self.measured: dict[str, Tensor] | None = None  # by `measure`, or from the adapter's file

    def measure(self, weight: Tensor) -> None:
        """Take from the base's weight what the seed cannot give.

        Raises:
            ValueError: if the weight is not finite.
        """
        self.measured = {}

    def _finite(self, weight: Tensor) -> Tensor:
        if not weight.isfinite().all():
            raise ValueError(
                f"A weight must be finite to be replaced, `{self.name}` is not; repair the base model, or leave that "
                "module out."
            )
        return weight.detach()

    def measured_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors in `measured`."""
        return {}

    def saved(self) -> dict[str, Tensor]:
        """The tensors that the adapter's file must hold beside theta_d.

        Raises:
            ValueError: if they should have come with an adapter's file, but were not read.
        """
        if self.measured is None:
            raise ValueError(
                f"The start of the factors of `{self.name}` must come with the adapter's file, but was not read. "
                "transformers' load_adapter reads theta_d alone: use PeftModel.from_pretrained(model, folder). A "
                "config that has wrapped a model belongs to that adapter: for a new one make a new SubspaceConfig."
            )
        return self.measured

    def loaded(self, measured: dict[str, Tensor]) -> Self:
        """The start with the tensors of an adapter's file, whatever the base's weight says."""
        twin = copy.copy(self)
        twin.measured = measured
        return twin

    @abstractmethod
    def draw(self, device: torch.device) -> Factors:
        """The factors, in float32."""

    @uncounted
    def __call__(self, device: torch.device) -> Factors:
        return self.state(device)

    def _held(self, device: torch.device) -> Factors:
        if device not in self._drawn:
            self.saved()  # raises if the tensors that drawing needs were not read
            with unrecorded():
                self._drawn = {device: self.draw(device)}
        return self._drawn[device]

    def philox(self, purpose: str) -> Philox:
        return Philox(self._seed, self.name, f"LowRank:{purpose}", self._version)

    def orthonormal(self, purpose: str, *shape: int) -> Tensor:
        """Orthonormal columns from the Haar measure (Mezzadri 2007): float64 [..., rows, columns] on the CPU."""
        Q, R = torch.linalg.qr(self.normal(purpose, *shape))
        return Q * R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """Standard normals of this shape: float64 on the CPU."""
        return self.philox(purpose).normals(0, prod(shape))[0].double().view(shape)


class Increment(Start):
    """The product is zero but its gradient is not: B_0 = 0 of two factors, W_0 = 0 of three.

    A_0 is uniform in +-1 / sqrt(columns), as in LoRA (Hu et al. 2021). U_0 has orthonormal columns and V_0
    orthonormal rows.
    """

    replaces = False

    def draw(self, device):
        rows, columns, rank, stack = self.shapes.rows, self.shapes.columns, self.shapes.rank, self.shapes.stack
        if self.shapes.factors == 2:
            uniforms = self.philox("A").uniforms(0, prod(stack) * rank * columns, device)
            return None, (2 * uniforms - 1).view(*stack, rank, columns) / sqrt(columns)
        U, V = self.orthonormal("U", *stack, rows, rank), self.orthonormal("V", *stack, columns, rank).mT.contiguous()
        return U.float().to(device), None, V.float().to(device)


class Drawn(Start):
    """Factors drawn from the seed, whose product has the Frobenius norm of the weight that it replaces.

    Two factors share that norm equally; of three, W alone has it.
    """

    def measure(self, weight):
        self.measured = {"norm": self._finite(weight).double().norm().view(1).cpu()}

    def measured_shapes(self):
        return {"norm": (1,)}

    @abstractmethod
    def direction(self) -> list[Tensor]:
        """The factors before they are scaled to the norm of the weight: float64 on the CPU."""

    def draw(self, device):
        factors = self.direction()
        product = factors[0] if len(factors) == 2 else factors[0] @ factors[1]
        # the Frobenius norm of the whole product from two [rank, rank] matrices
        norm = (product.mT @ product @ (factors[-1] @ factors[-1].mT)).trace().sqrt()
        ratio = (self.measured["norm"].cpu() / (norm * abs(self.scaling))).squeeze()
        if len(factors) == 2 and ratio == 0:  # for a weight of zeros, one factor alone is zero: else nothing trains
            factors = [factors[0] / factors[0].norm() * self.shapes.rank**0.5, factors[1] * 0]
        elif len(factors) == 2:
            factors = [factor * ratio.sqrt() for factor in factors]
        else:
            factors[1] = factors[1] * ratio
        return tuple(factor.float().to(device) for factor in factors)


class Orthogonal(Drawn):
    """B_0 with orthogonal columns and A_0 with orthogonal rows of equal length; U_0, c I and V_0 likewise."""

    def direction(self):
        rows, columns, rank = self.shapes.rows, self.shapes.columns, self.shapes.rank
        left, right = self.orthonormal("left", rows, rank), self.orthonormal("right", columns, rank).mT
        return [left, right] if self.shapes.factors == 2 else [left, torch.eye(rank, dtype=left.dtype), right]


class Random(Drawn):
    """Factors with independent Gaussian entries."""

    def direction(self):
        return [self.normal(suffix, *shape) for suffix, shape in self.shapes.parts.items()]


class TruncatedSVD(Start):
    """The best approximation of the weight by a matrix of this rank (Eckart and Young 1936).

        W_0 ~ U S V^T:    B_0 = U sqrt(S), A_0 = sqrt(S) V^T,    or U, S, V^T as three factors

    The adapter's file holds them, because another machine may give singular vectors another sign, or turn them among
    equal singular values.
    """

    def measure(self, weight):
        rank, matrix = self.shapes.rank, self._finite(weight).reshape(self.shapes.rows, -1)
        U, S, Vh = torch.linalg.svd(matrix.to(torch.promote_types(matrix.dtype, torch.float32)), full_matrices=False)
        U, S, Vh = U[:, :rank], S[:rank] / abs(self.scaling), Vh[:rank]
        U = U if self.scaling > 0 else -U
        if self.shapes.factors == 2:
            zero = S / S[0].clamp_min(torch.finfo(S.dtype).tiny) <= max(matrix.shape) * torch.finfo(S.dtype).eps
            root = S.sqrt().masked_fill(zero, 0)
            # where a singular value is zero, B_0 is not: with both factors zero nothing there would train
            factors = U * root.masked_fill(zero, root[0] or 1), root[:, None] * Vh
        else:
            factors = U, S.diag(), Vh
        self.measured = {
            suffix: factor.float().contiguous() for suffix, factor in zip(self.shapes.parts, factors, strict=True)
        }

    def measured_shapes(self):
        return self.shapes.parts

    def draw(self, device):
        return tuple(self.measured[suffix].to(device) for suffix in self.shapes.parts)


STARTS: dict[str, type[Start]] = {"svd": TruncatedSVD, "orthogonal": Orthogonal, "random": Random}
"""Where the factors of a replaced weight may start, by the name that a config gives; the only list."""
