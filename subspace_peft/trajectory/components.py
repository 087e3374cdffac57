"""Principal components of samples: the Gram matrix of their differences, its spectrum, and orthonormal columns."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from .samples import Samples


FLOOR = 1e-14
"""In a Gram matrix of float64, eigenvalues below FLOOR times its size times its largest entry are rounding errors."""


class Components:
    """W V Sigma^-1 of W = X M, where X = [w_0, w_1 - w_0, ..., w_(t-1) - w_0] and W^T W V = V Sigma^2.

    Centring and increments only change the small matrix M. X^T X [t, t] is computed once, in float64 over chunks of
    rows.

    Args:
        samples: The w_i.
        memory: Bytes to use at most.
        increments: Whether the columns of W are w_i - w_(i-1) instead of w_i.
    """

    def __init__(self, samples: Samples, memory: int, increments: bool):
        self.samples, self.memory, self.increments = samples, memory, increments

    @cached_property
    def gram(self) -> Tensor:
        """X^T X: float64 [t, t].

        Raises:
            ValueError: if the samples are not finite.
        """
        gram = torch.zeros(len(self.samples), len(self.samples), dtype=torch.float64)
        for _, chunk in self.samples.chunks(self.memory):
            gram.addmm_(chunk, chunk.T)
        if not gram.diagonal().isfinite().all():
            raise ValueError(
                f"Samples must be finite, {self.samples.describe_not_finite(self.memory)} is not; delete the files "
                "from the step on at which training diverged."
            )
        return gram

    def combination(self, center: bool) -> Tensor:
        """M: float64 [t, k], k = t, or t - 1 for increments."""
        M = torch.eye(len(self.samples), dtype=torch.float64)
        M[0] = 1
        if self.increments:
            M = M[:, 1:] - M[:, :-1]
        if center and M.shape[1]:
            M = M - M.mean(1, keepdim=True)
        if self.increments or center:
            M[0] = 0  # exactly: the differences above leave rounding errors here
        return M

    def spectrum(self, center: bool) -> tuple[Tensor, Tensor, float]:
        """Sigma^2 [k], descending; M V [t, k]; and the floor: rounding errors, values of Sigma^2 below it, are 0."""
        M = self.combination(center)
        if not M.shape[1]:
            raise ValueError("`increments` are differences of two samples or more, got one sample.")
        squares, V = torch.linalg.eigh(M.T @ self.gram @ M)
        squares, V = squares.flip(0), V.flip(1)
        V = V * V.gather(0, V.abs().argmax(0, keepdim=True)).sign()  # an eigenvector has no sign: fix it
        used = self.gram.diagonal()[M.ne(0).any(1)]
        floor = FLOOR * len(self.samples) * used.max().item() if len(used) else 0.0
        return squares.where(squares > floor, 0.0), M @ V, floor

    def columns(self, d: int, center: bool) -> Tensor:
        """A such that the columns of X A are the first d components, orthonormal: float64 [t, d].

        Raises:
            ValueError: if the columns of W do not span d dimensions.
        """
        squares, A, floor = self.spectrum(center)
        rank = int(squares.count_nonzero())
        if d > rank:
            folder = str(self.samples.paths[0].parent)
            raise ValueError(
                f"`d` must be at most {rank}, the dimensions that the {len(self.samples)} samples in {folder!r} span"
                f"{' around their mean' if center else ''}, got {d}; lower `d`, or record more samples that differ."
            )
        A = A[:, :d] / squares[:d].sqrt()
        return self._orthonormalised(A) if floor > 1e-6 * squares[d - 1] else A

    def _orthonormalised(self, A: Tensor) -> Tensor:
        """A R^-1 for the R of X A = Q R. This removes what rounding errors did to columns of small Sigma."""
        gram = torch.zeros(A.shape[1], A.shape[1], dtype=torch.float64)
        for _, rows in self.rows(A):
            gram.addmm_(rows.T, rows)
        R, failed = torch.linalg.cholesky_ex(gram, upper=True)
        if failed:
            raise ValueError(
                f"`d` must be lower than {A.shape[1]} for these samples, which nearly depend on each other."
            )
        return torch.linalg.solve_triangular(R, A, upper=True, left=False)

    def rows(self, A: Tensor) -> Iterator[tuple[int, Tensor]]:
        """X A in chunks of rows: the first row of each chunk, and float64 [n, d]."""
        for first, chunk in self.samples.chunks(self.memory, beside=24 * A.shape[1]):
            yield first, chunk.T @ A
