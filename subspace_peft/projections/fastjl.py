"""FastJL: the transpose of a fast Johnson-Lindenstrauss transform."""

import torch
from torch import Tensor

from ..hadamard import hadamard, kept_matrix, matrix, next_power_of_two
from .base import Block, Projection, working
from .blocks import Blocks

SHARED = 4  # positions that share a sign of a block
SHARED_FROM = 64  # block size from which they do: below, too few sign patterns would be left


class FastJL(Projection):
    """P = [D2 H D1_1 S; D2 H D1_2 S; ...], cropped to n rows; blocks of 2^⌈log2 d⌉.

    The fast Johnson-Lindenstrauss transform (Ailon and Chazelle, "The fast Johnson-Lindenstrauss transform and
    approximate nearest neighbors", SIAM J. Comput. 39, 2009) maps down, from D to d, by sparse · Hadamard · signs;
    this is its transpose. D1_b, D2: random signs, H: the Hadamard matrix, S: theta_d at the first d positions, or
    with `nnz_per_row` = q > 1 the sum of q signed entries of theta_d at each.

    With q = 1 every entry is ±1 and the columns of a whole block are exactly orthogonal. Positions are numbered
    (k, i), k up to 4, and H = H_k ⊗ H_i. D1_b is random signs of the tensor times random signs of the block that do
    not depend on k: H_k then acts once per tensor. D2 is signs of i, a product of signs of its digits, which are part
    of the factors of H_i. (Signs as Kronecker products: Jin, Kolda and Ward, "Faster Johnson-Lindenstrauss transforms
    via Kronecker products", 2021.)
    """

    def __init__(self, block: Block):
        super().__init__(block)
        self.size = next_power_of_two(block.d)
        self.blocks = Blocks(block.n, self.size, SHARED if self.size >= SHARED_FROM else 1)
        self.nnz = block.nnz_per_row or 1

    def draw(self, device: torch.device) -> tuple[Tensor, ...]:
        inner = self.philox("fastjl inner signs").signs(0, self.size, device)
        per_block = self.size // self.blocks.shared
        signs = self.philox("fastjl block signs").signs(0, self.blocks.count * per_block, device)
        factors = [matrix(size, device=device) for size in self.blocks.sizes]
        for k, factor in enumerate(factors):
            factor *= self.philox(f"fastjl outer signs {k}").signs(0, len(factor), device)
        if self.nnz == 1:
            scatter = (inner[: self.block.d].clone(),)
        else:
            slots = self.nnz * self.size
            order = self.philox("fastjl scatter").permutations(self.block.d, 0, -(-slots // self.block.d), device)
            weights = self.philox("fastjl scatter signs").signs(0, slots, device).view(self.nnz, self.size)
            scatter = (weights * inner, order.view(-1)[:slots].view(self.nnz, -1))
        return signs.view(-1, per_block), factors, scatter

    def apply(self, theta_d: Tensor) -> Tensor:
        signs, factors, scatter = self.state(theta_d.device)
        z = self._scatter(working(theta_d), *scatter)
        return self.blocks.expand(self._shared_transform(z), signs, factors).to(theta_d.dtype)

    def adjoint(self, grad: Tensor) -> Tensor:
        signs, factors, scatter = self.state(grad.device)
        v = self.blocks.reduce(working(grad), signs, factors)
        return self._gather(self._shared_transform(v), *scatter).to(grad.dtype)

    def _scatter(self, z: Tensor, weights: Tensor, columns: Tensor | None = None) -> Tensor:
        """D1 S z: [..., d] -> [..., size]."""
        if columns is None:
            return torch.nn.functional.pad(z * weights, (0, self.size - self.block.d))
        return (z[..., columns] * weights).sum(-2)

    def _gather(self, v: Tensor, weights: Tensor, columns: Tensor | None = None) -> Tensor:
        """S^T D1 v: [..., size] -> [..., d]."""
        if columns is None:
            return v[..., : self.block.d] * weights
        zero = v.new_zeros((*v.shape[:-1], self.block.d))
        return zero.index_add(-1, columns.flatten(), (v.unsqueeze(-2) * weights).flatten(-2))

    def _shared_transform(self, v: Tensor) -> Tensor:
        """H_k ⊗ I."""
        k = self.blocks.shared
        if k == 1:
            return v
        return (kept_matrix(k, v) @ v.view(*v.shape[:-1], k, -1)).view(v.shape)

    def column_square_norms(self) -> Tensor:
        d, n = self.block.d, self.block.n
        if self.nnz == 1:
            return torch.full((d,), float(n), dtype=torch.float64)
        signs, factors, (weights, columns) = self.state(torch.device("cpu"))
        # a position may hold one column twice: first the sum, then its square
        s = torch.zeros(self.size * d, dtype=torch.float64)
        at = torch.arange(self.size) * d + columns
        s.index_add_(0, at.flatten(), weights.double().flatten())
        whole = self.size * s.view(self.size, d).square().sum(0)

        def rows(indicators: Tensor) -> Tensor:
            v = Blocks(self.size, self.size, self.blocks.shared).reduce(indicators, signs[-1:], factors)
            return self._gather(self._shared_transform(v), weights, columns)

        return whole * (self.blocks.count - 1) + self.blocks.last_block(whole, rows)
