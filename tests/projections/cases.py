"""Projections of any size, and the matrices they stand for."""

import math

import torch

from subspace_peft.projections import PROJECTIONS, TensorRows


def make(name, n, d, nnz=None, /, **changes):
    """A projection of that size; identity takes its d from n."""
    generator = torch.Generator().manual_seed(n + d)
    if name == "basis":
        changes["given"] = torch.randn(n, d, generator=generator)
    elif name == "coordinate":
        k = max(1, min(n, d) // 2)
        changes |= {"given": torch.randperm(n, generator=generator)[:k].sort().values, "column": d - k}
    elif name == "kronecker":
        side = next(k for k in range(math.isqrt(n), 0, -1) if n % k == 0)
        changes.setdefault("shape", (n // side, side))
    elif name == "identity":
        d, changes["offset"] = n + 5, 2
    return PROJECTIONS[name](TensorRows(**{"name": "a.weight", "n": n, "d": d, "nnz_per_row": nnz} | changes))


def random(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


def explicit(projection):
    """P, from unit vectors: float64 [n, d]."""
    return projection(torch.eye(projection.rows.d, dtype=torch.float64)).T
