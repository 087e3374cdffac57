"""Coordinates: which numbers of a target tensor are moved by P theta_d, and the increment that they make."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import prod, sqrt

import torch
from torch import Tensor

from .philox import Philox
from .projections import Projection
from .projections.base import full_precision


class Coordinates(ABC):
    """One target tensor as a function of z, the normalised theta_d.

    Args:
        name: Of the tensor in the base model.
        shape: Of the tensor.
        projections: For each of `parts`, the rows of P that move it.
    """

    def __init__(self, name: str, shape: Sequence[int], projections: dict[str, Projection]):
        self.name = name
        self.shape = tuple(shape)
        self.projections = projections

    @staticmethod
    @abstractmethod
    def parts(shape: Sequence[int], rank: int | None) -> dict[str, tuple[int, ...]]:
        """Suffix and shape of the tensors that are projected; empty where these coordinates do not fit."""

    @abstractmethod
    def increment(self, z: Tensor) -> Tensor:
        """What is added to the tensor. [..., d] -> [..., *shape]"""

    @abstractmethod
    def moved_from(self, origin: Tensor, z: Tensor) -> Tensor:
        """The tensor: origin plus increment. [..., d] -> [..., *shape]"""

    @property
    def moves(self) -> int:
        """How many of the projected numbers P moves."""
        return sum(projection.moved for projection in self.projections.values())


class Weight(Coordinates):
    """theta is the tensor itself: W = W_0 + P z."""

    @staticmethod
    def parts(shape, rank):
        return {"": tuple(shape)}

    def increment(self, z):
        return self.projections[""](z).reshape((*z.shape[:-1], *self.shape))

    def moved_from(self, origin, z):
        return self.projections[""](z, origin)


class LowRank(Coordinates):
    """theta is a pair of factors: W = W_0 + alpha / rank (B_0 + P_B z)(A_0 + P_A z), with B_0 = 0.

    The tensor is read as a matrix of its first dimension by the rest. A_0 is drawn from the seed, uniform in
    +-1 / sqrt(columns), as LoRA's (Hu et al. 2021) is; so at z = 0 the increment is zero and its gradient is not.
    """

    def __init__(self, name, shape, projections, rank: int, alpha: float, seed: int, version: int):
        super().__init__(name, shape, projections)
        self.rank = rank
        self.scaling = alpha / rank
        self._philox = Philox(seed, name, "LowRank:A", version)
        self._origin_A: Tensor | None = None

    @staticmethod
    def parts(shape, rank):
        if len(shape) < 2:
            return {}
        return {".B": (shape[0], rank), ".A": (rank, prod(shape[1:]))}

    def __getstate__(self):
        return {**self.__dict__, "_origin_A": None}

    def origin_A(self, device: torch.device) -> Tensor:
        """A_0: float32 [rank, columns]."""
        if self._origin_A is None or self._origin_A.device != device:
            with torch.inference_mode(False), torch.no_grad():
                columns = prod(self.shape[1:])
                uniforms = self._philox.uniforms(0, self.rank * columns, device)
                self._origin_A = (2 * uniforms - 1).view(self.rank, columns) / sqrt(columns)
        return self._origin_A

    def factors(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The scaled B: [..., rows, rank], and A: [..., rank, columns]."""
        batch, columns = z.shape[:-1], prod(self.shape[1:])
        B = self.projections[".B"](z).reshape(*batch, self.shape[0], self.rank)
        A = self.projections[".A"](z).reshape(*batch, self.rank, columns)
        return B * self.scaling, self.origin_A(z.device).to(z.dtype) + A

    def increment(self, z):
        B, A = self.factors(z)
        with full_precision(z):
            return (B @ A).reshape(*z.shape[:-1], *self.shape)

    def moved_from(self, origin, z):
        return origin + self.increment(z)


COORDINATES: dict[str, type[Coordinates]] = {"weight": Weight, "low_rank": LowRank}
