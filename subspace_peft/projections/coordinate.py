"""Coordinate: some weights move, each by its own entry of theta_d, the others stay."""

import torch
from torch import Tensor

from .base import Projection, TensorRows


class Coordinate(Projection):
    """P[given[k], column + k] = 1, all else 0: random pruning, lottery tickets.

    `given`: sorted positions inside the tensor; `column`: how many columns belong to tensors before this one.
    """

    def __init__(self, rows: TensorRows):
        super().__init__(rows)
        given = rows.given
        if given is None or given.dim() != 1 or given.is_floating_point():
            raise ValueError(f"`coordinate` needs the positions inside {rows.name} as a vector of integers.")
        k = len(given)
        if rows.column + k > rows.d:
            raise ValueError(f"{rows.name} needs columns {rows.column} to {rows.column + k}, but d = {rows.d}.")
        if k and (given[0] < 0 or given[-1] >= rows.n or (given[1:] <= given[:-1]).any()):
            raise ValueError(f"Positions inside {rows.name} must be sorted, distinct and below n = {rows.n}.")

    @property
    def moved(self) -> int:
        return len(self.rows.given)

    def draw(self, device: torch.device) -> tuple[Tensor, ...]:
        return (self.rows.given.detach().to(device, torch.int64),)

    def apply(self, theta_d: Tensor) -> Tensor:
        (positions,) = self.state(theta_d.device)
        zero = theta_d.new_zeros((*theta_d.shape[:-1], self.rows.n))
        return zero.index_copy(-1, positions, theta_d.narrow(-1, self.rows.column, self.moved))

    def adjoint(self, grad: Tensor) -> Tensor:
        (positions,) = self.state(grad.device)
        after = self.rows.d - self.rows.column - self.moved
        return torch.nn.functional.pad(grad.index_select(-1, positions), (self.rows.column, after))

    def square_norm(self) -> float:
        return float(self.moved)

    def column_square_norms(self) -> Tensor:
        norms = torch.zeros(self.rows.d, dtype=torch.float64)
        norms[self.rows.column : self.rows.column + self.moved] = 1
        return norms
