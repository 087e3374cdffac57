"""Gaussian width, and Gordon's theorem about the sets that a random subspace misses (Larsen et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


NORMALS_AT_A_TIME = 2**20


class Estimate(NamedTuple):
    value: float
    error: float  # one standard error of the mean over the draws


def gaussian_width(support: Callable[[Tensor], Tensor], D: int, draws: int = 1000, seed: int = 0) -> Estimate:
    """The Gaussian width of a set S in D dimensions, by Monte Carlo (definition 3.1):

        w(S) = 1/2 E sup_{x, y in S} <g, x - y> = 1/2 E [h(g) + h(-g)],    g ~ N(0, I).

    Args:
        support: h(g) = sup_{x in S} <g, x>: float64 [n, D] -> [n].

    Raises:
        ValueError: if there are fewer than two draws, which give no standard error.
    """
    if draws < 2:
        raise ValueError(f"`draws` must be at least 2, got {draws}.")
    generator = torch.Generator().manual_seed(seed)
    values = []
    for n in torch.ones(draws).split(max(1, NORMALS_AT_A_TIME // D)):
        g = torch.randn(len(n), D, generator=generator, dtype=torch.float64)
        values.append((support(g) + support(-g)) / 2)
    values = torch.cat(values)
    return Estimate(values.mean().item(), values.std().item() / math.sqrt(draws))


def ellipsoid_support(radii: Tensor) -> Callable[[Tensor], Tensor]:
    """h(g) = |r * g|, the support function of the ellipsoid with these semi-axes.

    For a ball it is r |g|, and the width is r sqrt(D) for large D.

    Args:
        radii: [D]; zero for directions in which the ellipsoid is flat.
    """
    return lambda g: (g * radii.to(g)).norm(dim=-1)


def ellipsoid_width_bounds(radii: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds on the squared Gaussian width of ellipsoids (lemma B.1):

        2 / pi sum_i r_i^2 <= w(E)^2 <= sum_i r_i^2.

    For a sublevel set of a quadratic well, sum_i r_i^2 = 2 epsilon Tr(H^-1) (corollary B.1). The lemma prints
    sqrt(2 / pi), but its proof gives 2 / pi: a segment, with one r_i above 0, has w^2 = 2 / pi r^2.

    Args:
        radii: [..., D]
    """
    total = radii.square().sum(-1)
    return 2 / math.pi * total, total


def escape_probability(D: int, d: int, w: float) -> float:
    """Gordon's bound on the probability that a random subspace of d dimensions misses a set (theorems 3.1 and 3.2):

        P(miss) >= 1 - 3.5 exp(-(k / sqrt(k + 1) - w)^2 / 18)    for k = D - d > w^2

    Args:
        w: The Gaussian width of the closed set on the unit sphere around a point of the subspace. For an affine
            subspace through w_0 it is the square root of the local angular dimension at w_0.

    Returns:
        The bound; 0 if the theorem says nothing.

    Raises:
        ValueError: if d is not between 0 and D, or w is negative.
    """
    if not 0 <= d <= D or w < 0:
        raise ValueError(f"`d` must be between 0 and D = {D} and `w` at least 0, got d = {d} and w = {w}.")
    k = D - d
    if k <= w**2:
        return 0.0
    return max(0.0, 1 - 3.5 * math.exp(-((k / math.sqrt(k + 1) - w) ** 2) / 18))
