"""Quadratic wells, L(w) = 1/2 w^T H w, and whether an affine subspace meets a sublevel set (Larsen et al. 2021).

Everything is in the basis of H's eigenvectors, so H is given by its eigenvalues; a random subspace stays a random
subspace in that basis. An eigenvalue of zero is a direction in which the well is flat. A well with n eigenvalues 0 and
D - n eigenvalues 1 is half the squared distance to an affine subspace of n dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .angular import floating


def radii(eigenvalues: Tensor, epsilon: Tensor | float) -> Tensor:
    """The semi-axes r_i = sqrt(2 epsilon / lambda_i) of the ellipsoid S(epsilon) = {w: L(w) <= epsilon} (section 3.2).

    Infinite in directions in which the well is flat.

    Args:
        eigenvalues: [D]
        epsilon: [...], above 0.

    Returns:
        [..., D]

    Raises:
        ValueError: if an eigenvalue is negative, or `epsilon` is not positive.
    """
    _check(eigenvalues)
    eigenvalues = floating(eigenvalues)
    epsilon = torch.as_tensor(epsilon, dtype=eigenvalues.dtype)
    if not (epsilon > 0).all():
        raise ValueError(f"`epsilon` must be above 0, the loss at the bottom of the well, got {epsilon.min().item()}.")
    return (2 * epsilon[..., None] / eigenvalues).sqrt()


def lowest_losses(eigenvalues: Tensor, w_0: Tensor, A: Tensor) -> Tensor:
    """min over theta of L(w_0 + A theta), exactly, for the first 0, 1, ..., d columns of A.

    The subspace meets S(epsilon) if and only if the minimum is at most epsilon. With QR = [H^(1/2) A, H^(1/2) w_0],
    the minimum over the first j columns is half the sum of the squares in the last column of R below its first j
    entries.

    Args:
        eigenvalues: [D]
        w_0: [..., D]
        A: [..., D, d] with linearly independent columns.

    Returns:
        [..., d + 1], float64.

    Raises:
        ValueError: if an eigenvalue is negative, or the shapes do not fit.
    """
    _check(eigenvalues)
    D, d = A.shape[-2:]
    if d > D or eigenvalues.shape != (D,) or w_0.shape[-1] != D:
        raise ValueError(
            "`A` must be [..., D, d] with d <= D, `eigenvalues` [D] and `w_0` [..., D], got "
            f"{list(A.shape)}, {list(eigenvalues.shape)} and {list(w_0.shape)}."
        )
    root = eigenvalues.double().sqrt()[:, None]
    columns = root * torch.cat([A.double(), w_0.double()[..., None]], -1)
    R = torch.linalg.qr(columns, mode="r").R
    squares = torch.zeros(*R.shape[:-2], d + 1, dtype=R.dtype, device=R.device)
    squares[..., : R.shape[-2]] = R[..., -1].square()
    return squares.flip(-1).cumsum(-1).flip(-1) / 2


def success(
    eigenvalues: Tensor, epsilon: Tensor, R: Tensor, d: int | None = None, runs: int = 10, seed: int = 0
) -> Tensor:
    """P_s(d, epsilon, R) of figure 5: the share of random affine subspaces at distance R that meet S(epsilon).

    A run draws the direction of w_0 and d columns of A. Its subspaces of fewer dimensions are spanned by the first
    columns, and its w_0 at other distances are multiples of one, because the lowest loss is proportional to R^2. So
    runs are independent, and P_s does not fall with d.

    Args:
        epsilon: [E]
        R: [K]; distances of w_0 from the minimum.
        d: The largest dimension; D if left out.

    Returns:
        [K, d + 1, E]; for subspaces of 0 to d dimensions.

    Raises:
        ValueError: if an eigenvalue is negative, or d above D.
    """
    lowest = random_lowest_losses(eigenvalues, d, runs, seed)
    losses = R.double().square()[:, None, None, None] * lowest[:, :, None]  # [K, runs, d + 1, 1]
    return (losses <= epsilon.double()).double().mean(1)


def random_lowest_losses(eigenvalues: Tensor, d: int | None = None, runs: int = 10, seed: int = 0) -> Tensor:
    """`lowest_losses` from a random w_0 of norm 1 in random subspaces: [runs, d + 1]."""
    D = len(eigenvalues)
    d = D if d is None else d
    generator = torch.Generator().manual_seed(seed)
    lowest = []
    for _ in range(runs):  # not batched: A is large, and its QR decomposition uses all cores
        w_0 = torch.randn(D, generator=generator, dtype=torch.float64)
        A = torch.randn(D, d, generator=generator, dtype=torch.float64)
        lowest.append(lowest_losses(eigenvalues.cpu(), w_0 / w_0.norm(), A))
    return torch.stack(lowest)


def affine_threshold(D: int, n: int) -> int:
    """The threshold training dimension of an affine subspace of n dimensions, D - n at any distance (appendix B.3)."""
    return D - n


def affine_distance(D: int, n: int, d: int) -> float:
    """The root mean square distance between random affine subspaces of n and d dimensions (appendix B.3):

        sqrt(max(D - n - d, 0) / D),

    in units of the distance between the two points through which they are drawn.
    """
    return (max(D - n - d, 0) / D) ** 0.5


def _check(eigenvalues: Tensor) -> None:
    if not (eigenvalues >= 0).all():
        raise ValueError(
            f"The eigenvalues of a well must be at least 0, the smallest is {eigenvalues.min().item():.3g}; "
            "leave out the directions of negative curvature."
        )
