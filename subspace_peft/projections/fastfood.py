"""Fastfood: Gaussian rows from two Hadamard transforms."""

from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from .blocks import Blocks
from .hadamard import hadamard
from .joint import cache_products
from .joint_blocks import JointBlocks


MAX_PAIRS = 2**26  # products that the closed form of the column norms may make; the other rows are squared themselves


class Fastfood(Blocks):
    """P = [D H G_1 Π H B; D H G_2 Π H B; ...], cropped to n rows and d columns; blocks of 2^⌈log2 d⌉.

    Le, Sarlos and Smola, "Fastfood: computing Hilbert space expansions in loglinear time", ICML 2013, without their
    S, which makes row lengths vary like those of a Gaussian matrix. B: random signs, Π: a uniform permutation, G_b:
    standard normals, H: the unnormalised Hadamard matrix, D: random signs; entries have variance 1 or 2.

    The paper draws B and Π for every block; here all blocks of a tensor have the same B and Π, so that
    u = Π H B theta_d costs O(d log d) once. Given u, the blocks H G_b u are independent because the G_b are. In the
    transposed direction, blocks with the same gradient would all be reduced to the same few entries. D prevents that;
    the paper has no D.
    """

    @classmethod
    def together(cls, projections):
        return cache_products(JointBlocks, projections)

    def choose_k(self) -> int:
        return 1

    def draw_coefficients(self, device: torch.device) -> Tensor:
        normals = self.philox("fastfood gaussian").normals(0, self.block_count * self.size, device)
        return normals.view(-1, self.size)

    def draw_inner(self, device: torch.device) -> tuple[Tensor, ...]:
        # A power of two, so that the scale adds no rounding to P.
        scale = 2.0 ** -((self.size.bit_length() - 1) // 2)
        signs = self.philox("fastfood signs").signs(0, self.rows.d, device).mul_(scale)
        order = self.philox("fastfood permutation").permutations(self.size, 0, 1, device)[0]
        return signs, order, order.argsort()

    def join_inner(self, states):
        signs, *orders = zip(*states, strict=True)
        starts = range(0, len(signs) * self.size, self.size)
        return torch.stack(signs), *(
            torch.cat([o + start for o, start in zip(order, starts, strict=True)]) for order in orders
        )

    def inner(self, z: Tensor, *state: Tensor) -> Tensor:
        signs, order, _ = state
        return _permuted(hadamard(z * signs, self.size), order)

    def inner_adjoint(self, v: Tensor, *state: Tensor) -> Tensor:
        signs, _, inverse = state
        return hadamard(_permuted(v, inverse))[..., : self.rows.d] * signs

    def square_norm(self) -> float:
        with torch.inference_mode(False), torch.no_grad():
            state = self.state(torch.device("cpu"))
            if self.is_matrix:
                return state[0].double().square().sum().item()
            gaussian, _, (signs, order, _) = state
            d, size, rows, last = self.rows.d, self.size, self.last_block_rows, gaussian[-1].double()
            total = d * size * gaussian[:-1].double().square().sum().item()
            if size in (d, rows):
                total += d * rows * last.square().sum().item()
            else:
                total += _square_norm_of_corner(last, order, rows, d)
            return total * signs[0].item() ** 2

    def square_norms(self, state: tuple) -> Tensor:
        """For rows a to a + r of a block, a a multiple of r = 2^s, by Parseval, with x_p = H[a, p] G_p:

            sum_i P_ij^2 = r sum_(q < r) (sum_(p = q mod r) x_p H[Π_p, j])^2,

        which is sum_p x_p^2 plus a Hadamard transform of the products x_p x_p', each at position Π_p xor Π_p'.
        """
        gaussian, _, (signs, order, _) = state
        squares = gaussian[:-1].double().square().sum() * self.size + torch.zeros(self.rows.d, dtype=torch.float64)
        last, start = gaussian[-1].double(), 0
        for r in (2**s for s in reversed(range(6, self.size.bit_length()))):
            if self.last_block_rows & r and self.size**2 // (2 * r) <= MAX_PAIRS:
                x = last * hadamard(one_hot(torch.tensor(start), self.size).double())
                x, positions = x.view(-1, r), order.view(-1, r)
                cross = x.new_zeros(self.size)
                for u in range(len(x) - 1):
                    at, products = positions[u] ^ positions[u + 1 :], 2 * x[u] * x[u + 1 :]
                    cross.index_add_(0, at.flatten(), products.flatten())
                squares += r * (x.square().sum() + hadamard(cross)[: self.rows.d])
                start += r
        return squares * signs[0].double() ** 2 + self.row_squares(start, self.last_block_rows, state)


def _square_norm_of_corner(gaussian: Tensor, order: Tensor, rows: int, columns: int) -> float:
    """The square norm of the first rows and columns of H G Π H.

    For rows a to a + r and columns b to b + e, both as in `square_norms`, it is

        r e sum_(q < r, t < e) (sum_(p = q mod r, Π_p = t mod e) H[a, p] G_p H[Π_p, b])^2.
    """
    size, total = len(gaussian), 0.0
    at, bits = torch.arange(size), size.bit_length() - 1
    for (r, of_a), (e, of_b) in product(_intervals(rows, size), _intervals(columns, size)):
        group = (at & (r - 1)) * e + (order & (e - 1))
        keys = group.bitwise_left_shift_(bits).bitwise_or_(at)  # one integer for each: numpy sorts them fast
        keys.numpy().sort()
        group, within = keys >> bits, keys & (size - 1)
        values = (of_a * gaussian * of_b[order])[within]
        number = group.diff(prepend=group[:1]).ne(0).cumsum(0)
        total += r * e * values.new_zeros(size).index_add_(0, number, values).square().sum().item()
    return total


def _intervals(count: int, size: int) -> list[tuple[int, Tensor]]:
    """The intervals of lengths 2^s that make up 0 to count: each one's length, and the row of H at its start."""
    found, start = [], 0
    for length in (2**s for s in reversed(range(size.bit_length()))):
        if count & length:
            found.append((length, hadamard(one_hot(torch.tensor(start), size).double())))
            start += length
    return found


def _permuted(x: Tensor, order: Tensor) -> Tensor:
    """Permute the last dimension, or with the orders of several tensors the last two: [batch, ..., size]."""
    return x.reshape(-1, len(order)).index_select(-1, order).view(x.shape)
