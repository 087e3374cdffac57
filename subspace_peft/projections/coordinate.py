"""Coordinate: some weights move, each by its own number, the rest stay."""

import torch
from torch import Tensor

from .base import Block, Projection


class Coordinate(Projection):
    """P[given[k], column + k] = 1, all else 0: random pruning, lottery tickets.

    `given`: sorted positions inside the tensor; `column`: how many columns belong to tensors before this one.
    """

    def __init__(self, block: Block):
        super().__init__(block)
        given = block.given
        if given is None or given.dim() != 1 or given.is_floating_point():
            raise ValueError(f"`coordinate` needs the positions inside {block.name} as a vector of integers.")
        k = len(given)
        if block.column + k > block.d:
            raise ValueError(f"{block.name} needs columns {block.column} to {block.column + k}, but d = {block.d}.")
        if k and (given[0] < 0 or given[-1] >= block.n or (given[1:] <= given[:-1]).any()):
            raise ValueError(f"Positions inside {block.name} must be sorted, distinct and below n = {block.n}.")

    @property
    def moved(self) -> int:
        return len(self.block.given)

    def draw(self, device: torch.device) -> tuple[Tensor, ...]:
        return (self.block.given.detach().to(device, torch.int64),)

    def apply(self, theta_d: Tensor) -> Tensor:
        (positions,) = self.state(theta_d.device)
        zero = theta_d.new_zeros((*theta_d.shape[:-1], self.block.n))
        return zero.index_copy(-1, positions, theta_d.narrow(-1, self.block.column, self.moved))

    def adjoint(self, grad: Tensor) -> Tensor:
        (positions,) = self.state(grad.device)
        after = self.block.d - self.block.column - self.moved
        return torch.nn.functional.pad(grad.index_select(-1, positions), (self.block.column, after))

    def column_square_norms(self) -> Tensor:
        norms = torch.zeros(self.block.d, dtype=torch.float64)
        norms[self.block.column : self.block.column + self.moved] = 1
        return norms
