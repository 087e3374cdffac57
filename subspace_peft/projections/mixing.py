"""Mixing: neighbouring rows and columns of a matrix mixed by small Hadamard matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import TensorRows
from .hadamard import matrix_like
from .philox import as_signs
from .recorded import Redrawn, is_recorded, unrecorded


ENTRIES_AT_A_TIME = 2**18  # of the matrix: input and output of one chunk then stay in a core's cache


class Mixing(Redrawn):
    """C -> W, a matrix [r, c] made of n blocks C_l: [⌈r / n⌉, c / n], and its transpose.

        W[i n + a, j n + e] = s[i n + a] t[j n + e] n^(-1/2) Σ_l A[a, l] H[e, l] C_l[i, j],   |W|^2 = n |C|^2

    s and t: random signs, H: the Hadamard matrix of order n, A: H with its columns in random order; in the usual order
    the sum would depend on a xor e alone, and entries of W would be equal. W is cropped to r rows: whatever C is, the
    row i n + a has the norm of the row i of all C_l, so all columns of P lose equally. For n = 1, W is C.

    Args:
        rows: Whose seed and name determine the state, unless its `given` begins with it.
    """

    def __init__(self, shape: tuple[int, int], n: int, rows: TensorRows):
        super().__init__()
        self.r, self.c = shape
        self.n, self.rows = n, rows
        self.groups = -(-self.r // n)

    def _held(self, device: torch.device) -> tuple[Tensor, ...]:
        drawn = self._drawn.get(device)
        return self._draw(device) if drawn is None else drawn

    def _draw(self, device: torch.device) -> tuple[Tensor, ...]:
        given = self.rows.given
        with unrecorded():
            drawn = self.draw(device) if given is None else tuple(x.to(device) for x in given[:-1])
        if self.rows.cache:
            self._drawn = {device: drawn}
        return drawn

    def draw(self, device: torch.device) -> tuple[Tensor, ...]:
        """The order of A's columns, [n], and s and t, 8 signs a byte; nothing for n = 1."""
        if self.n == 1:
            return ()
        order = self.rows.philox("mixing order").permutations(self.n, 0, 1, device)[0]
        return order, self.rows.philox("mixing signs").sign_bytes(0, -(-(self.groups * self.n + self.c) // 8), device)

    def apply(self, C: Tensor) -> Tensor:
        """[..., ⌈r / n⌉ c] -> [..., r c]."""
        if self.n == 1:
            return C
        A, H, s, t = self.matrices(C)
        C, s = self.in_blocks(C).transpose(-3, -2), s.view(-1, self.n, 1)  # C: [..., i, l, j]
        H = (H * t.view(-1, self.n, 1)).permute(2, 0, 1)  # [l, j, e]
        parts = [(s[at] * A) @ (C[..., at, :, :, None] * H).flatten(-2) for at in self._chunks(C.shape[:-3].numel())]
        W = (parts[0] if len(parts) == 1 else torch.cat(parts, -3)).flatten(-3)
        return W[..., : self.r * self.c]

    def adjoint(self, W: Tensor) -> Tensor:
        """[..., r c] -> [..., ⌈r / n⌉ c]."""
        if self.n == 1:
            return W
        A, H, s, t = self.matrices(W)
        W, s = W.unflatten(-1, (self.r, self.c)), s.view(-1, self.n, 1)
        H = (H * t.view(-1, self.n, 1)).permute(2, 0, 1)
        parts = []
        for at in self._chunks(W.shape[:-2].numel()):
            rows = padded(W[..., at.start * self.n : at.stop * self.n, :], (at.stop - at.start) * self.n, -2)
            mixed = ((s[at] * A).mT @ rows.unflatten(-2, (-1, self.n))).unflatten(-1, (-1, self.n))
            parts.append((mixed * H).sum(-1).transpose(-3, -2))
        return (parts[0] if len(parts) == 1 else torch.cat(parts, -2)).reshape(*W.shape[:-2], -1)

    def in_blocks(self, C: Tensor) -> Tensor:
        """[..., ⌈r / n⌉ c] -> [..., n, ⌈r / n⌉, c / n]."""
        return C.view(*C.shape[:-1], self.n, self.groups, self.c // self.n)

    def matrices(self, x: Tensor) -> tuple[Tensor, ...]:
        """n^(-1/2) A, H, s and t, in the dtype and on the device of x; s has the length of whole groups."""
        order, octets = self.state(x.device)
        H, rows = matrix_like(self.n, x), self.groups * self.n
        signs = as_signs(octets)[: rows + self.c].to(x.dtype)
        return H[:, order] * self.n**-0.5, H, signs[:rows], signs[rows:]

    def _chunks(self, batch: int) -> list[slice]:
        """Slices of the groups of n rows that are computed at a time."""
        if is_recorded():
            return [slice(0, self.groups)]
        step = max(1, ENTRIES_AT_A_TIME // max(1, batch * self.n * self.c))
        return [slice(at, min(at + step, self.groups)) for at in range(0, self.groups, step)]


def padded(x: Tensor, length: int, dim: int) -> Tensor:
    """x with zeros up to this length of one of its last dimensions."""
    missing = length - x.shape[dim]
    return torch.constant_pad_nd(x, (*(0, 0) * (-dim - 1), 0, missing)) if missing else x
