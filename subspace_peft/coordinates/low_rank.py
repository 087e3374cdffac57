"""LowRank: the factors of an increment, or of the weight itself, move."""

from __future__ import annotations

from torch import Tensor

from ..projections.base import full_precision
from .base import Coordinates
from .starts import OUTER, Shape, Start


class LowRank(Coordinates):
    """theta are the factors of a matrix of low rank: the tensor's first dimension by the rest.

        B A = alpha / rank (B_0 + P_B z)(A_0 + P_A z)
        U W V = alpha / rank (U_0 + gamma P_U z)(W_0 + P_W z)(V_0 + gamma P_V z)

    It is added to the tensor, or replaces it: that is where the factors start.

    Args:
        start: The factors at z = 0.
        gamma: Of three factors: how far the outer two move when the inner one moves by 1 (Qu 2023, the discrepant
            learning rate of the compressed network).
    """

    def __init__(self, name, shape, projections, start: Start, gamma: float = 1.0):
        super().__init__(name, shape, projections)
        self.start, self.gamma = start, gamma

    @staticmethod
    def parts(shape, rank, factors=2):
        return Shape.of(shape, rank, factors).parts if len(shape) > 1 else {}

    def factors(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The left one, scaled: [..., rows, rank], and the right one: [..., rank, columns]; of three, U W and V."""
        moved = []
        for (suffix, shape), origin in zip(self.start.shape.parts.items(), self.start(z.device), strict=True):
            factor = self.projections[suffix](z).reshape(*z.shape[:-1], *shape)
            if self.gamma != 1 and suffix in OUTER:
                factor = factor * self.gamma
            moved.append(factor if origin is None else origin.to(z.dtype) + factor)
        left, *inner, right = moved
        if inner:
            with full_precision(z):
                left = left @ inner[0]
        return left if self.start.scaling == 1 else left * self.start.scaling, right

    def increment(self, z):
        left, right = self.factors(z)
        with full_precision(z):
            return (left @ right).reshape(*z.shape[:-1], *self.shape)

    def moved_from(self, origin, z):
        return self.increment(z) if self.replaces else origin + self.increment(z)
