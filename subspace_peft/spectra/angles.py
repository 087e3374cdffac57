"""Angles between subspaces and between vectors, to the last digits also where they are tiny."""

from __future__ import annotations

import torch
from torch import Tensor


def principal_angles(A: Tensor, B: Tensor) -> Tensor:
    """The principal angles between the spans of A and B, ascending, in radians (Bjorck and Golub 1973):

        cos theta_i = sigma_i(A^T B),    sin theta_i = sigma_i(B - A A^T B)

    in reverse order. An angle below 45 degrees is taken from its sine: arccos loses half of the digits there, all of
    them below 1e-8 in float64.

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
            off = (columns.mT @ columns - torch.eye(columns.shape[1]).to(columns)).abs().max().item()
            if not off <= 100 * torch.finfo(columns.dtype).eps ** 0.5:
                raise ValueError(
                    f"The columns of `{name}` must be orthonormal, {name}^T {name} differs from the identity by "
                    f"{off:.2g}; pass torch.linalg.qr({name}).Q."
                )
    A, B = (A, B) if A.shape[1] >= B.shape[1] else (B, A)
    if not B.shape[1]:
        return B.new_empty(0)
    products = A.mT @ B
    cosines = torch.linalg.svdvals(products)  # descending: of ascending angles
    sines = torch.linalg.svdvals(B - A @ products).flip(0)
    small = cosines.square() >= 0.5
    return torch.where(small, sines.clamp(max=1).asin(), cosines.clamp(max=1).acos())


def vector_angles(A: Tensor, B: Tensor) -> Tensor:
    """The angle between the lines of column i of A and of B, in radians: 2 atan2(|a - b|, |a + b|) of unit columns.

    arccos |<a_i, b_i>|, accurate also where that is 1 (Kahan 2006). A singular vector has no sign; and no direction
    where its singular value is another's too, so look at `principal_angles` of all of them there.

    Args:
        A, B: [n, q], of no zero column.

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
