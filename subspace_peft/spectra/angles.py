"""Angles between subspaces and between vectors, accurate to the last digits even if they are tiny."""

from __future__ import annotations

import torch
from torch import Tensor


def principal_angles(A: Tensor, B: Tensor) -> Tensor:
    """The principal angles between the spans of A and B, ascending, in radians (Bjorck and Golub 1973):

        cos theta_i = sigma_i(A^T B),    sin theta_i = sigma_i(B - A A^T B)

    in reverse order. An angle below 45 degrees is computed from its sine: arccos loses half of the digits of small
    angles, and all of them below 1e-8 in float64.

    Args:
        A: [n, p], of orthonormal columns.
        B: [n, q], of orthonormal columns.

    Returns:
        [min(p, q)]

    Raises:
        ValueError: if the shapes do not fit, or the columns are not orthonormal.
    """
    if A.ndim != 2 or B.ndim != 2 or len(A) != len(B):
        raise ValueError(f"`A` and `B` must be [n, p] and [n, q], got {list(A.shape)} and {list(B.shape)}.")
    for name, columns in (("A", A), ("B", B)):
        if columns.numel():
            error = (columns.mT @ columns - torch.eye(columns.shape[1]).to(columns)).abs().max().item()
            if not error <= 100 * torch.finfo(columns.dtype).eps ** 0.5:
                raise ValueError(
                    f"The columns of `{name}` must be orthonormal, {name}^T {name} differs from the identity by "
                    f"{error:.2g}; pass torch.linalg.qr({name}).Q."
                )
    A, B = (A, B) if A.shape[1] >= B.shape[1] else (B, A)
    if not B.shape[1]:
        return B.new_empty(0)
    products = A.mT @ B
    cosines = torch.linalg.svdvals(products)  # descending, so that the angles ascend
    sines = torch.linalg.svdvals(B - A @ products).flip(0)
    small = cosines.square() >= 0.5
    return torch.where(small, sines.clamp(max=1).asin(), cosines.clamp(max=1).acos())


def vector_angles(A: Tensor, B: Tensor) -> Tensor:
    """The angle between the lines of column i of A and of B, in radians: 2 atan2(|a - b|, |a + b|) for unit columns.

    This is arccos |<a_i, b_i>|, but accurate near 1 too (Kahan 2006). Lines, because a singular vector has no sign. If
    several singular values are equal, their vectors have no direction either: use `principal_angles` of all of them.

    Args:
        A, B: [n, q], without zero columns.

    Returns:
        [q]

    Raises:
        ValueError: if the shapes differ.
    """
    if A.ndim != 2 or A.shape != B.shape:
        raise ValueError(f"`A` and `B` must both be [n, q], got {list(A.shape)} and {list(B.shape)}.")
    A, B = A / A.norm(dim=0), B / B.norm(dim=0)
    B = torch.where((A * B).sum(0) < 0, -B, B)
    return 2 * torch.atan2((A - B).norm(dim=0), (A + B).norm(dim=0))
