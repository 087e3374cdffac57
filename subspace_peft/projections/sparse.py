"""Sparse: a fixed number of random signs a row."""

import torch
from torch import Tensor

from .base import Projection, TensorRows, working
from .joint import Joint, gather


PIECE = 2**20  # entries drawn at a time


class Sparse(Projection):
    """Each row of P has `nnz_per_row` entries ±1 (default 1) in distinct columns, the rest is zero.

    With one entry it is the isometric one-hot map of Uni-LoRA (Li et al., 2025), with signs: theta_i = ± theta_d[j].
    Columns come from uniform permutations stacked one below the other, so that every column is used equally often,
    up to one.
    """

    def __init__(self, rows: TensorRows):
        super().__init__(rows)
        self.nnz = rows.nnz_per_row or 1
        if self.nnz > rows.d:
            raise ValueError(f"`nnz_per_row` must be at most d = {rows.d}, got {self.nnz}; lower it or raise `d`.")
        self.served = rows.d // self.nnz  # that one permutation serves

    @classmethod
    def together(cls, projections):
        return gather(JointSparse, projections)

    def draw(self, device: torch.device) -> tuple[Tensor, ...]:
        n, d, nnz = self.rows.n, self.rows.d, self.nnz
        index = torch.empty(n, nnz, dtype=torch.int32, device=device)
        step = max(1, PIECE // d)  # permutations at a time
        for at in range(0, n, step * self.served):
            stop = min(at + step * self.served, n)
            first, last = at // self.served, -(-stop // self.served)
            stacked = self.philox("sparse columns").permutations(d, first, last, device)[:, : self.served * nnz]
            signs = self.philox("sparse signs").signs(at * nnz, stop * nnz, device).view(-1, nnz)
            # a sign is part of the index: entries d.. of (theta_d, -theta_d)
            index[at:stop] = stacked.reshape(-1, nnz)[: stop - at] + d * (signs < 0)
        return (index,)

    def apply(self, theta_d: Tensor) -> Tensor:
        (index,) = self.state(theta_d.device)
        return _gathered(theta_d, index)

    def adjoint(self, grad: Tensor) -> Tensor:
        (index,) = self.state(grad.device)
        return _scattered(grad, index, self.rows.d)

    def column_square_norms(self) -> Tensor:
        (index,) = self.state(torch.device("cpu"))
        return torch.bincount(index.view(-1).long() % self.rows.d, minlength=self.rows.d).double()


class JointSparse(Joint):
    """The rows of several tensors, one below the other."""

    members: list[Sparse]

    @staticmethod
    def extent(member: Sparse) -> tuple[int, int]:
        return member.rows.n, 0

    def draw(self, device: torch.device) -> tuple[Tensor, ...]:
        return (torch.cat([member.draw(device)[0] for member in self.members]),)

    def apply(self, z: Tensor) -> Tensor:
        return _gathered(z, *self.state(z))

    def adjoint(self, grad: Tensor) -> Tensor:
        return _scattered(grad, *self.state(grad), self.members[0].rows.d)


def _gathered(theta_d: Tensor, index: Tensor) -> Tensor:
    z = working(theta_d)
    y = torch.cat((z, -z), -1).index_select(-1, index.view(-1))
    return (y if index.shape[1] == 1 else y.unflatten(-1, index.shape).sum(-1)).to(theta_d.dtype)


def _scattered(grad: Tensor, index: Tensor, d: int) -> Tensor:
    g = working(grad)
    if index.shape[1] > 1:
        g = g.unsqueeze(-1).expand(*g.shape, index.shape[1]).flatten(-2)
    both = g.new_zeros((*g.shape[:-1], 2 * d)).index_add(-1, index.view(-1), g)
    return (both[..., :d] - both[..., d:]).to(grad.dtype)
