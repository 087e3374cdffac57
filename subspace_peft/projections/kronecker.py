"""Kronecker: rows that act on activations by products of small matrices."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .base import JointCache, Map, Projection, TensorRows, to_working_dtype
from .fastjl import FastJL
from .mixing import Mixing
from .product import Product, look_up, product
from .recorded import is_transformed, uncounted


SMALLEST_N = 16  # below, forming the tensor is as fast, and too few different sums of n entries ± would be left
LARGEST_N = 64  # above, C would have few entries


def block_count(r: int, c: int, d: int) -> int:
    """n: a power of two that divides c, as near as there is to √(r c / (r + c)), the cheapest; 1 without blocks.

    C, of ⌈r / n⌉ c entries, keeps at least d. P depends on this rule: another one needs another projection version.
    """
    n = 1
    while n < LARGEST_N and 2 * n * n * (r + c) <= r * c:
        n *= 2
    while n >= SMALLEST_N and (c % n or -(-r // n) * c < d):
        n //= 2
    return n if n >= SMALLEST_N else 1


class Kronecker(Projection):
    """P = M F: F is FastJL with ⌈r / n⌉ c rows, and M mixes its entries C into the tensor, a matrix [r, c].

    M is an isometry times √n, cropped to r rows, so the columns of P are as orthogonal as those of F, but for the rows
    that are cut. It is a Kronecker fast Johnson-Lindenstrauss transform (Jin, Kolda and Ward, "Faster
    Johnson-Lindenstrauss transforms via Kronecker products", 2021) with a second transform, F, inside it.

    Small tensors and vectors, and those whose rows have no factor of 16 in their length, have n = 1, as in `fastjl`.
    """

    def __init__(self, rows: TensorRows):
        super().__init__(rows)
        r, c = rows.shape or (rows.n, 1)
        n = block_count(r, c, rows.d)
        self.mixing = Mixing((r, c), n, rows)
        inner = None if rows.given is None else rows.given[-1]
        self.blocks = FastJL(replace(rows, n=self.mixing.groups * c, shape=None, nnz_per_row=None, given=inner))

    @classmethod
    def together(cls, projections):
        cache = FastJL.together([projection.blocks for projection in projections])
        for projection in projections if cache else ():
            if projection.blocks.joint_cache:
                projection.joint_cache = _Mixed(cache)
        return cache

    @property
    def state_bytes(self) -> int:
        return self.blocks.state_bytes

    def draw(self, device: torch.device) -> tuple:
        return *self.mixing.state(device), self.blocks.state(device)

    def apply(self, theta_d: Tensor) -> Tensor:
        return self.mixing.apply(self.blocks.apply(to_working_dtype(theta_d))).to(theta_d.dtype)

    def adjoint(self, grad: Tensor) -> Tensor:
        return self.blocks.adjoint(self.mixing.adjoint(to_working_dtype(grad))).to(grad.dtype)

    @property
    def has_product(self) -> bool:
        return self.mixing.n > 1

    def is_product_cheaper(self, tokens: int, trains: bool) -> bool:
        """Whether `product` takes less time than P z and a product with it; chosen by measurement on CPUs.

        In training, forming P z also means the gradient of a matrix [r, c].
        """
        r, c = self.mixing.r, self.mixing.c
        return trains or tokens <= r * c / (r + c)

    @uncounted
    def product(self, x: Tensor, z: Tensor, transposed: bool = False, output: Tensor | None = None) -> Tensor:
        """x Wᵀ, or x W if `transposed`, for the matrix W = P z, without W; added to the output if there is one.

        [..., inputs], [d] -> [..., outputs], in the dtype of the output, or float32 at least.
        """
        operands = self._operands(z)
        rows = [each if each is None else each.reshape(-1, each.shape[-1]) for each in (x, output)]
        z, *constants = operands
        by_operations = is_transformed() or torch.autograd.forward_ad._current_level >= 0
        y = (product if by_operations else Product.apply)(rows[0], z, rows[1], *constants, transposed)
        return y.view(*x.shape[:-1], y.shape[-1])

    def is_look_up_cheaper(self, count: int) -> bool:
        """Whether `look_up` of so many rows takes less time than P z and a look-up in it; by measurement on CPUs."""
        return count <= self.mixing.r

    @uncounted
    def look_up(self, at: Tensor, z: Tensor) -> Tensor:
        """Rows of the matrix P z at these indices, without P z: [...], [d] -> [..., c], float32 at least."""
        return look_up(at.reshape(-1), *self._operands(z)).view(*at.shape, self.mixing.c)

    def _operands(self, z: Tensor) -> tuple[Tensor, Mixing, FastJL | None]:
        """z, M and F; or F z, M and None, where a cache holds F z."""
        C = self.joint_cache and self.joint_cache.blocks.entries(z, self.blocks)
        return (z, self.mixing, self.blocks) if C is None else (C, self.mixing, None)

    def column_square_norms(self) -> Tensor:
        """Every row of a group of n has the square norm of the group's rows of C together: as many ones."""
        return self.blocks.column_square_norms() * self.mixing.r / self.mixing.groups


class _Mixed(JointCache):
    """P z of tensors whose C is held by a cache of `fastjl`."""

    def __init__(self, blocks: JointCache):
        self.blocks = blocks

    def normalised(self, theta_d, scale):
        return self.blocks.normalised(theta_d, scale)

    def entries(self, z, member):
        C = self.blocks.entries(z, member.blocks)
        return C if C is None or member.mixing.n == 1 else Map.apply(C, member.mixing, False)
