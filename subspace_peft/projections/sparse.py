"""Sparse: a fixed number of random signs a row."""

import torch
from torch import Tensor

from . import scratch
from .base import Projection, TensorRows, to_working_dtype
from .joint import Joint, cache_products
from .recorded import is_recorded


ENTRIES_AT_A_TIME = 2**17  # of the permutations that are drawn, and of P that are applied


class Sparse(Projection):
    """Each row of P has `nnz_per_row` entries ±1 (default 1) in distinct columns, the rest is zero.

    With one entry it is the isometric one-hot map of Uni-LoRA (Li et al., 2025), with signs: theta_i = ± theta_d[j].
    The columns come from uniform permutations stacked one below the other: where `nnz_per_row` divides d, the
    numbers of uses of any two columns differ by at most one.
    """

    def __init__(self, rows: TensorRows):
        super().__init__(rows)
        self.nnz = rows.nnz_per_row or 1
        if self.nnz > rows.d:
            raise ValueError(f"`nnz_per_row` must be at most d = {rows.d}, got {self.nnz}; lower it or raise `d`.")
        self.rows_per_permutation = rows.d // self.nnz

    @classmethod
    def together(cls, projections):
        return cache_products(JointSparse, projections)

    @property
    def index_dtype(self) -> torch.dtype:
        return torch.int16 if 2 * self.rows.d <= 2**15 else torch.int32

    @property
    def state_bytes(self) -> int:
        return self.rows.n * self.nnz * self.index_dtype.itemsize

    def draw(self, device: torch.device) -> tuple[Tensor, ...]:
        n, d, nnz = self.rows.n, self.rows.d, self.nnz
        index = torch.empty(n, nnz, dtype=self.index_dtype, device=device)
        rows_at_a_time = max(1, ENTRIES_AT_A_TIME // d) * self.rows_per_permutation
        for start in range(0, n, rows_at_a_time):
            stop = min(start + rows_at_a_time, n)
            first, last = start // self.rows_per_permutation, -(-stop // self.rows_per_permutation)
            permutations = self.philox("sparse columns").permutations(d, first, last, device)
            columns = permutations[:, : self.rows_per_permutation * nnz].reshape(-1, nnz)[: stop - start]
            signs = self.philox("sparse signs").signs(start * nnz, stop * nnz, device).view(-1, nnz)
            # The index holds the sign too: it points into (theta_d, -theta_d).
            index[start:stop] = columns.to(index.dtype).add_((signs < 0).to(index.dtype), alpha=d)
        return (index,)

    def apply(self, theta_d: Tensor) -> Tensor:
        (index,) = self.state(theta_d.device)
        return _gather(theta_d, index)

    def move(self, theta_d: Tensor, origin: Tensor) -> Tensor:
        if theta_d.dim() > 1:
            return super().move(theta_d, origin)
        (index,) = self.state(theta_d.device)
        return _gather(theta_d, index, origin.reshape(-1)).view(origin.shape)

    def adjoint(self, grad: Tensor) -> Tensor:
        (index,) = self.state(grad.device)
        return _scatter(grad, index, self.rows.d)

    def square_norm(self) -> float:
        return float(self.rows.n * self.nnz)

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
        return _gather(z, *self.state(z))

    def adjoint(self, grad: Tensor) -> Tensor:
        return _scatter(grad, *self.state(grad), self.members[0].rows.d)


def _gather(theta_d: Tensor, index: Tensor, origin: Tensor | None = None) -> Tensor:
    """P theta_d: the sum of the entries of (theta_d, -theta_d) that each row of the index [n, nnz] points to.

    Args:
        origin: Added to the result: [n].
    """
    z = to_working_dtype(theta_d)
    both = torch.cat((z, -z), -1)
    if z.dim() > 1 or is_recorded() or index.shape[1] > 1 or z is not theta_d:
        y = both.index_select(-1, index.view(-1).int())
        y = (y if index.shape[1] == 1 else y.unflatten(-1, index.shape).sum(-1)).to(theta_d.dtype)
        return y if origin is None else y + origin
    out = theta_d.new_empty(len(index)) if origin is None else scratch.empty(theta_d, (len(index),))
    for at in range(0, len(index), ENTRIES_AT_A_TIME):
        part = out[at : at + ENTRIES_AT_A_TIME]
        torch.index_select(both, 0, index[at : at + ENTRIES_AT_A_TIME, 0].long(), out=part)
        if origin is not None:
            part.add_(origin[at : at + ENTRIES_AT_A_TIME])
    return out


def _scatter(grad: Tensor, index: Tensor, d: int) -> Tensor:
    """P^T grad, the transpose of `_gather`."""
    both = to_working_dtype(grad.new_zeros((*grad.shape[:-1], 2 * d)))
    step = len(index) if is_recorded() else ENTRIES_AT_A_TIME
    for part, rows in zip(grad.split(step, -1), index.split(step), strict=True):
        g = to_working_dtype(part)
        if index.shape[1] > 1:
            g = g.unsqueeze(-1).expand(*g.shape, index.shape[1]).flatten(-2)
        both = both.index_add_(-1, rows.view(-1).int(), g)
    return (both[..., :d] - both[..., d:]).to(grad.dtype)
