"""LowRank: the factors of an increment move, or the factors of the weight itself."""

from __future__ import annotations

from torch import Tensor

from ..projections.base import full_precision
from .base import Coordinates
from .starts import OUTER, FactorShapes, Start


class LowRank(Coordinates):
    """The tensor, read as a matrix of its first dimension by the rest, moves by a product of low-rank factors.

    A stack of matrices, [experts, ., .], has factors for each matrix.

        B A   = alpha / rank (B_0 + P_B z)(A_0 + P_A z)
        U W V = alpha / rank (U_0 + gamma P_U z)(W_0 + P_W z)(V_0 + gamma P_V z)

    The start says whether the product is added to the tensor or replaces it.

    A padding row of zeros is put into the left factor, so that the row of the product is zero too.

    Args:
        start: The factors at z = 0.
        gamma: How far U and V move when W moves by 1; for three factors only. It is the discrepant learning rate of
            the compressed network of Qu (2023).
    """

    def __init__(self, name, shape, projections, start: Start, gamma: float = 1.0, padding: int | None = None):
        super().__init__(name, shape, projections, padding)
        self.start, self.gamma = start, gamma

    @staticmethod
    def parts(shape, rank, factors=2, is_stacked=False):
        return FactorShapes.of(shape, rank, factors, is_stacked).parts if len(shape) > 1 else {}

    def factors(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The left factor times alpha / rank and strength, [..., rows, rank], and the right one, [..., rank, columns].

        They are B and A, or of three factors U W and V; of a stack, for each of its matrices.
        """
        moved = []
        for (suffix, shape), origin in zip(self.start.shapes.parts.items(), self.start(z.device), strict=True):
            factor = self.projections[suffix](z).reshape(*z.shape[:-1], *shape)
            if self.gamma != 1 and suffix in OUTER:
                factor = factor * self.gamma
            moved.append(factor if origin is None else origin.to(z.dtype) + factor)
        left, *inner, right = moved
        if inner:
            with full_precision(z):
                left = left @ inner[0]
        scaling = self.start.scaling * self.strength
        left = left if scaling == 1 else left * scaling
        return self.with_padding(left), right

    def increment(self, z):
        left, right = self.factors(z)
        with full_precision(z):
            return (left @ right).reshape(*z.shape[:-1], *self.shape)

    def moved_from(self, origin, z):
        return self.increment(z) if self.replaces else origin + self.increment(z)
