"""FastJL: the transpose of a fast Johnson-Lindenstrauss transform."""

import torch
from torch import Tensor

from .base import TensorRows
from .blocks import Blocks
from .joint import cache_products
from .joint_blocks import JointBlocks
from .philox import as_signs


K = 4  # positions with the same sign in a block
SIZE_FOR_K = 64  # the smallest block with K > 1: below, too few sign patterns would be left


class FastJL(Blocks):
    """P = [D2 H D1_1 S; D2 H D1_2 S; ...], cropped to n rows; blocks of 2^⌈log2 d⌉.

    The fast Johnson-Lindenstrauss transform (Ailon and Chazelle, "The fast Johnson-Lindenstrauss transform and
    approximate nearest neighbors", SIAM J. Comput. 39, 2009) maps down, from D to d, by sparse · Hadamard · signs;
    this is its transpose. D1_b, D2: random signs, H: the Hadamard matrix, S: theta_d at the first d positions, or
    with `nnz_per_row` = q > 1 the sum of q signed entries of theta_d at each position.

    With q = 1 every entry is ±1 and the columns of a whole block are exactly orthogonal. D1_b is the product of random
    signs of the tensor and random signs of the block. Groups of 4 positions have the same sign of the block, so two of
    the log2 steps of H act once a tensor. D2 is a product of signs (see Blocks).
    """

    BYTES_A_COEFFICIENT = 1 / 8

    def __init__(self, rows: TensorRows):
        super().__init__(rows)
        self.nnz = rows.nnz_per_row or 1

    @classmethod
    def together(cls, projections):
        return cache_products(JointBlocks, projections) if projections[0].nnz == 1 else None

    def choose_k(self) -> int:
        return K if self.size >= SIZE_FOR_K else 1

    def draw_coefficients(self, device: torch.device) -> Tensor:
        signs = self.philox("fastjl block signs").signs(0, self.block_count * self.length, device)
        return signs.view(-1, self.length)

    def draw_held(self, device: torch.device) -> Tensor:
        """8 signs a byte."""
        if self.length < 8:
            return self.draw_coefficients(device)
        octets = self.philox("fastjl block signs").sign_bytes(0, self.block_count * self.length // 8, device)
        return octets.view(self.block_count, -1)

    def coefficients(self, held: Tensor) -> Tensor:
        return unpacked(held)

    def draw_inner(self, device: torch.device) -> tuple[Tensor, ...]:
        philox = self.philox("fastjl inner signs")
        if self.nnz == 1:
            return (philox.sign_bytes(0, -(-self.rows.d // 8), device),)
        signs = philox.signs(0, self.size, device)
        slots = self.nnz * self.size
        order = self.philox("fastjl scatter").permutations(self.rows.d, 0, -(-slots // self.rows.d), device)
        weights = self.philox("fastjl scatter signs").signs(0, slots, device).view(self.nnz, self.size)
        return weights * signs, order.view(-1)[:slots].view(self.nnz, -1)

    def join_inner(self, states):
        return (torch.stack([weights for (weights,) in states]),)

    def inner(self, z: Tensor, *state: Tensor) -> Tensor:
        weights = unpacked(state[0])
        if self.nnz == 1:
            return torch.constant_pad_nd(z * weights[..., : self.rows.d].to(z.dtype), (0, self.size - self.rows.d))
        return (z[:, state[1]] * weights).sum(1)

    def inner_adjoint(self, v: Tensor, *state: Tensor) -> Tensor:
        weights = unpacked(state[0])
        if self.nnz == 1:
            return v[..., : self.rows.d] * weights[..., : self.rows.d].to(v.dtype)
        zero = v.new_zeros(len(v), self.rows.d)
        return zero.index_add(1, state[1].flatten(), (v.unsqueeze(1) * weights).flatten(1))

    def square_norms(self, state: tuple) -> Tensor:
        if self.nnz == 1:
            return torch.full((self.rows.d,), float(self.rows.n), dtype=torch.float64)
        weights, columns = state[2]
        # A position may hold one column twice: add first, then square.
        s = torch.zeros(self.size * self.rows.d, dtype=torch.float64)
        at = torch.arange(self.size) * self.rows.d + columns
        s.index_add_(0, at.flatten(), weights.double().flatten())
        whole = self.size * s.view(self.size, -1).square().sum(0)
        last = self.last_block_rows
        if 2 * last < self.size:  # square the rows on the smaller side of the crop
            return (self.block_count - 1) * whole + self.row_squares(0, last, state)
        return self.block_count * whole - self.row_squares(last, self.size, state)


def unpacked(signs: Tensor) -> Tensor:
    """Signs that are held 8 a byte as numbers; a saved P of version 0.1 holds numbers."""
    return as_signs(signs) if signs.dtype == torch.uint8 else signs
