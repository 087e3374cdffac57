"""The local angular dimension of an ellipsoid: how many directions from a point meet it (Larsen et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .width import Estimate, gaussian_width


HALVINGS = 80


def local_angular_dimension(radii: Tensor, w_0: Tensor, draws: int = 1000, seed: int = 0) -> Estimate:
    """d_local(S, w_0) = w(proj_{w_0}(S))^2 of the ellipsoid S = {w: sum_i w_i^2 / r_i^2 <= 1} (definition 3.2).

    A Monte Carlo mean over g, exact for each g. The threshold training dimension is D - d_local (equation 3.3).

    Args:
        radii: [D], D >= 2, above 0; may be infinite.
        w_0: [D]. From a point inside S all directions meet S: d_local is that of the whole sphere, D for large D.

    Raises:
        ValueError: if the shapes do not fit, or a radius is not above 0.
    """
    width = gaussian_width(directions_support(radii, w_0), len(radii), draws, seed)
    return Estimate(width.value**2, 2 * width.value * width.error)


def directions_support(radii: Tensor, w_0: Tensor) -> Callable[[Tensor], Tensor]:
    """The support function of proj_{w_0}(S), the unit directions in which S is seen from w_0 (equation 3.1).

    With M = diag(1 / r_i^2), c = w_0^T M w_0 - 1 and a = -M w_0, a line w_0 + t u, t > 0, meets S where

        u^T Q u <= 0  and  a^T u >= 0,    Q = c M - a a^T,

    a convex cone: Q has one negative eigenvalue, -kappa. If g lies in it, sup <g, u> = |g|. Otherwise the maximum is
    on its boundary, u ~ (Q + s I)^-1 g with u^T Q u = 0. Bisection finds s, which is the root of a monotone function.

    Args:
        radii: [D]
        w_0: [D]

    Returns:
        h(g) = sup <g, u>: float64 [n, D] -> [n]. It is negative if g points away from all of S.

    Raises:
        ValueError: if the shapes do not fit, or a radius is not above 0.
    """
    if radii.ndim != 1 or len(radii) < 2 or radii.shape != w_0.shape:
        raise ValueError(f"`radii` and `w_0` must both be [D], D >= 2, got {list(radii.shape)} and {list(w_0.shape)}.")
    if not (radii > 0).all():
        raise ValueError(f"`radii` must be above 0, the smallest is {radii.min().item():.3g}.")
    M, w_0 = radii.double() ** -2, w_0.double()
    a = -M * w_0
    c = -(a @ w_0) - 1
    if c <= 0:
        return lambda g: g.norm(dim=-1)
    eigenvalues, V = torch.linalg.eigh(c * M.diag() - torch.outer(a, a))
    axis = V[:, 0] * torch.sign(a @ V[:, 0])  # into the cone
    kappa, q, V = -eigenvalues[0], eigenvalues[1:].clamp(min=0), V[:, 1:]
    return lambda g: _cone_support(g @ axis, g @ V, kappa, q)


def _cone_support(t: Tensor, x: Tensor, kappa: Tensor, q: Tensor) -> Tensor:
    """sup of t b + <x, y> over the unit vectors (b, y) with b >= 0 and sum_i q_i y_i^2 <= kappa b^2.

    On the boundary y_i ~ x_i / (q_i + s), where sum_i q_i (x_i (kappa - s) / (q_i + s))^2 = kappa t^2; s > kappa if
    t > 0, and -q_1 < s < kappa otherwise. b is chosen so that (b, y) is on the boundary for any s: then an error in s
    changes the maximum only by its square.

    Args:
        t: [n], the part of g along the axis of the cone.
        x: [n, m], the rest.
        q: [m], ascending.
    """
    inside = (t >= 0) & (x.square() @ q <= kappa * t.square())
    ahead = (t > 0)[:, None]

    def denominators(share: Tensor) -> Tensor:  # q + s; s -> kappa for share -> 1
        return torch.where(ahead, q + kappa / share, (q - q[0]) + share * (kappa + q[0]))

    low, high = torch.zeros_like(t)[:, None], torch.ones_like(t)[:, None]
    for _ in range(HALVINGS):
        share = (low + high) / 2
        to_kappa = torch.where(ahead, kappa * (1 - 1 / share), (1 - share) * (kappa + q[0]))  # |kappa - s|
        left = (x * (to_kappa / denominators(share))).square() @ q
        further = (left > kappa * t.square())[:, None]
        low, high = torch.where(further, share, low), torch.where(further, high, share)
    y = x / denominators((low + high) / 2)
    b = (y.square() @ q / kappa).sqrt()
    boundary = (t * b + (x * y).sum(-1)) / (b.square() + y.square().sum(-1)).sqrt()
    return torch.where(inside, (t.square() + x.square().sum(-1)).sqrt(), boundary)


def local_dimension_bound(radii: Tensor, R: Tensor | float) -> Tensor:
    """The lower bound on d_local at distance R from the centre of the ellipsoid (equation 3.4):

        sum_i r_i^2 / (R^2 + r_i^2).

    D minus this is the upper bound on the threshold training dimension in figure 5.

    Args:
        radii: [..., D]; may be infinite.
        R: [...]
    """
    radii = floating(radii)
    R = torch.as_tensor(R, dtype=radii.dtype)[..., None]
    return (1 / (1 + (R / radii).square())).sum(-1)


def local_dimension_limit(radii: Tensor, R: Tensor | float) -> Tensor:
    """d_local at distance R in a random direction from the centre, for large D: the x that solves

        x = sum_i r_i^2 / (R^2 (1 - x / D) + r_i^2).

    This is not in the paper, whose equation (3.4) is the right-hand side at x = 0. For d random directions A, the
    projector onto the complement of the columns of H^(1/2) A has the deterministic equivalent nu (H + nu)^-1, where
    sum_i lambda_i / (lambda_i + nu) = d. So from a random w_0 the lowest loss in the subspace is nu R^2 d / (2 D). It
    equals epsilon if D - d is this x.

    Args:
        radii: [..., D]
        R: [...]

    Returns:
        [...]; D if w_0 is inside the ellipsoid on average, sum_i R^2 / (D r_i^2) <= 1.
    """
    D, radii = radii.shape[-1], floating(radii)
    R = torch.as_tensor(R, dtype=radii.dtype)
    low, high = (torch.zeros_like(radii[..., 0] * R) + end for end in (0, 1))
    for _ in range(HALVINGS):
        rest = (low + high) / 2  # 1 - x / D; if it is too small, the right-hand side is below x
        too_small = D - local_dimension_bound(radii, R * rest.sqrt()) > rest * D
        low, high = torch.where(too_small, rest, low), torch.where(too_small, high, rest)
    return D * (1 - low)


def floating(x: Tensor) -> Tensor:
    """Whole numbers as floats of double precision; what is combined with them would be cut to whole numbers too."""
    return x if x.is_floating_point() else x.double()
