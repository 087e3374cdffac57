"""Coordinates: which numbers of a target tensor are moved by P theta_d, and the increment that they make."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from ..projections import Projection
from .starts import Start


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

    start: Start | None = None
    """Where the projected numbers begin, unless it is the tensor as it is in the base."""

    @property
    def replaces(self) -> bool:
        """Whether the increment counts from zero, in place of the tensor as it is in the base."""
        return self.start is not None and self.start.replaces

    @staticmethod
    @abstractmethod
    def parts(shape: Sequence[int], rank: int | None, factors: int = 2) -> dict[str, tuple[int, ...]]:
        """Suffix and shape of the tensors that are projected; empty where these coordinates do not fit."""

    @abstractmethod
    def increment(self, z: Tensor) -> Tensor:
        """What is added to the tensor, or to zero. [..., d] -> [..., *shape]"""

    @abstractmethod
    def moved_from(self, origin: Tensor, z: Tensor) -> Tensor:
        """The tensor: origin plus increment. [..., d] -> [..., *shape]"""

    @property
    def moves(self) -> int:
        """How many of the projected numbers P moves."""
        return sum(projection.moved for projection in self.projections.values())
