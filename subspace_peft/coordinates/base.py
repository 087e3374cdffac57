"""Coordinates: which parameters P theta_d moves for one target tensor, and how the tensor follows from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from ..projections import Projection
from .starts import Start


class Coordinates(ABC):
    """One target tensor as a function of z, the normalised theta_d.

    Args:
        name: The name of the tensor in the base model.
        shape: The shape of the tensor.
        projections: The rows of P for each entry of `parts`, by its suffix.
    """

    def __init__(self, name: str, shape: Sequence[int], projections: dict[str, Projection]):
        self.name = name
        self.shape = tuple(shape)
        self.projections = projections

    start: Start | None = None
    """The factors at z = 0; None where the projected tensor is the base's tensor itself."""

    strength: float = 1.0
    """What the increment is multiplied by."""

    @property
    def replaces(self) -> bool:
        """Whether the increment takes the place of the base's tensor rather than being added to it."""
        return self.start is not None and self.start.replaces

    @staticmethod
    @abstractmethod
    def parts(
        shape: Sequence[int], rank: int | None, factors: int = 2, is_stacked: bool = False
    ) -> dict[str, tuple[int, ...]]:
        """The tensors that P moves, suffix -> shape; empty if a tensor of this shape has no such coordinates.

        Args:
            is_stacked: Whether the tensor is a matrix for each entry of its first dimension.
        """

    @abstractmethod
    def increment(self, z: Tensor) -> Tensor:
        """The increment to the base's tensor, or to zero if it `replaces` it: [..., d] -> [..., *shape]."""

    @abstractmethod
    def moved_from(self, origin: Tensor, z: Tensor) -> Tensor:
        """The moved tensor, origin plus increment: [..., d] -> [..., *shape]."""

    @property
    def moves(self) -> int:
        """How many entries of `parts` P moves: its non-zero rows."""
        return sum(projection.moved for projection in self.projections.values())
