"""Coordinates: which parameters P theta_d moves for one target tensor, and how the tensor follows from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..projections import Projection
from .starts import Start


def without_row(matrix: Tensor, at: int) -> Tensor:
    """The other rows of a matrix; a view of it if they are adjacent."""
    if at in (0, len(matrix) - 1):
        return matrix[1:] if at == 0 else matrix[:-1]
    return torch.cat((matrix[:at], matrix[at + 1 :]))


def with_row(rows: Tensor, row: Tensor, at: int) -> Tensor:
    """The rows [..., n, columns] and a row [1, columns] before the one at `at`: [..., n + 1, columns]."""
    row = row.expand(*rows.shape[:-2], *row.shape)
    if at == 0:  # without a split the backward pass is a view of the gradient
        return torch.cat((row, rows), -2)
    if at == rows.shape[-2]:
        return torch.cat((rows, row), -2)
    before, after = rows.split([at, rows.shape[-2] - at], -2)
    return torch.cat((before, row, after), -2)


@dataclass(frozen=True)
class Shape:
    """The shape of a target tensor, and which of its rows, if any, is padding: that one never moves."""

    whole: tuple[int, ...]
    padding: int | None = None

    @property
    def moving(self) -> tuple[int, ...]:
        """The shape of the rows that move."""
        return self.whole if self.padding is None else (self.whole[0] - 1, *self.whole[1:])

    def __str__(self) -> str:
        return f"{list(self.whole)}" + ("" if self.padding is None else f" with padding {self.padding}")


class Coordinates(ABC):
    """One target tensor as a function of z, the normalised theta_d.

    Args:
        name: The name of the tensor in the base model.
        shape: The shape of the tensor.
        projections: The rows of P for each entry of `parts`, by its suffix.
        padding: The row of the tensor, a matrix, that stays at its origin and has no rows in P; None if all move.
    """

    def __init__(
        self, name: str, shape: Sequence[int], projections: dict[str, Projection], padding: int | None = None
    ):
        self.name = name
        self.shape = tuple(shape)
        self.projections = projections
        self.padding = padding

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
            shape: The shape of the tensor without its padding.
            is_stacked: Whether the tensor is a matrix for each entry of its first dimension.
        """

    @abstractmethod
    def increment(self, z: Tensor) -> Tensor:
        """The increment to the base's tensor, or to zero if it `replaces` it: [..., d] -> [..., *shape]."""

    @abstractmethod
    def moved_from(self, origin: Tensor, z: Tensor) -> Tensor:
        """The moved tensor, origin plus increment: [..., d] -> [..., *shape]."""

    def with_padding(self, rows: Tensor) -> Tensor:
        """The rows that move, and zeros at the padding: [..., moving rows, columns] -> [..., rows, columns]."""
        if self.padding is None:
            return rows
        return with_row(rows, rows.new_zeros(1, rows.shape[-1]), self.padding)

    @property
    def moves(self) -> int:
        """How many entries of `parts` P moves: its non-zero rows."""
        return sum(projection.moved for projection in self.projections.values())
