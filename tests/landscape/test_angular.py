"""The local angular dimension against brute force, circular cones and random subspaces."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import chi

from subspace_peft.landscape import (
    directions_support,
    ellipsoid_support,
    gaussian_width,
    local_angular_dimension,
    local_dimension_bound,
    local_dimension_limit,
    radii,
    random_lowest_losses,
)
from tests.cases import normal


def sphere(D: int) -> torch.Tensor:
    """A dense grid of unit vectors in 2 or 3 dimensions."""
    i = torch.arange(200_000, dtype=torch.float64)
    if D == 2:
        angle = 2 * math.pi * i / len(i)
        return torch.stack([angle.cos(), angle.sin()], 1)
    z, angle = 1 - (2 * i + 1) / len(i), math.pi * (1 + 5**0.5) * i
    ring = (1 - z.square()).sqrt()
    return torch.stack([ring * angle.cos(), ring * angle.sin(), z], 1)


SPHERE = {D: sphere(D) for D in (2, 3)}


def seen(u: torch.Tensor, r: torch.Tensor, w_0: torch.Tensor) -> torch.Tensor:
    """Whether the ray from w_0 along u meets the ellipsoid: whether its point nearest to the centre is inside."""
    step, start = u / r, w_0 / r
    t = (-(step @ start) / step.square().sum(1)).clamp(min=0)
    return (start + t[:, None] * step).norm(dim=1) <= 1


@settings(max_examples=40)
@given(st.sampled_from([2, 3]), st.integers(0, 10**6), st.floats(1.05, 6))
def test_the_support_function_by_brute_force(D, seed, far):
    r = (normal(D, seed=seed) / 2).exp()
    w_0 = normal(D, seed=seed + 1)
    w_0 *= far / (w_0 / r).norm()
    u = SPHERE[D][seen(SPHERE[D], r, w_0)]
    assume(len(u) > 100)
    g = normal(20, D, seed=seed + 2)
    brute = (g @ u.T).amax(1)
    h = directions_support(r, w_0)(g)
    assert (h >= brute - 1e-9).all()
    torch.testing.assert_close(h, brute, rtol=0, atol=2e-4 if D == 2 else 2e-2)


@settings(max_examples=40)
@given(st.integers(2, 30), st.integers(0, 10**6), st.floats(1.001, 100))
def test_the_ball_is_a_circular_cone(D, seed, R):
    """Its half-angle is asin(r / R); outside it, at the angle phi from the axis, h(g) = |g| cos(phi - half-angle)."""
    w_0, g = normal(D, seed=seed), normal(50, D, seed=seed + 1)
    axis = -w_0 / w_0.norm()
    phi = torch.acos((g @ axis / g.norm(dim=1)).clamp(-1, 1))
    expected = g.norm(dim=1) * torch.cos((phi - math.asin(1 / R)).clamp(min=0))
    h = directions_support(torch.full((D,), 2.0), -2 * R * axis)(g)
    torch.testing.assert_close(h, expected, rtol=1e-9, atol=1e-7)


@settings(max_examples=20)
@given(st.integers(2, 40), st.integers(0, 10**6))
def test_symmetries_and_the_maximum(D, seed):
    """h does not depend on the unit of length or on reflections, and no direction to a point of S exceeds it."""
    r, w_0 = normal(D, seed=seed).exp(), 3 * D * normal(D, seed=seed + 1)
    assume((w_0 / r).norm() > 1)
    g = normal(20, D, seed=seed + 2)
    h = directions_support(r, w_0)(g)
    torch.testing.assert_close(directions_support(7 * r, 7 * w_0)(g), h)
    flip = torch.where(normal(D, seed=seed + 3) > 0, 1.0, -1.0)
    torch.testing.assert_close(directions_support(r, w_0 * flip)(g * flip), h)
    points = normal(500, D, seed=seed + 4)
    towards = points / points.norm(dim=1, keepdim=True) * r - w_0
    towards /= towards.norm(dim=1, keepdim=True)
    assert (h[:, None] >= g @ towards.T - 1e-9).all()


def test_the_maximum_is_stationary_and_on_the_cone():
    """The gradient of h is the maximiser: a unit vector whose ray from w_0 is a tangent to the ellipsoid."""
    r, w_0 = torch.logspace(-3, 0, 30).double(), normal(30)
    g = normal(200, 30, seed=1).requires_grad_()
    h = directions_support(r, w_0)(g)
    (u,) = torch.autograd.grad(h.sum(), g)
    torch.testing.assert_close(u.norm(dim=1), torch.ones(200, dtype=torch.float64))
    torch.testing.assert_close((g * u).sum(1), h)
    step, start = u.detach() / r, w_0 / r
    nearest = (start - (step @ start / step.square().sum(1))[:, None] * step).norm(dim=1)
    torch.testing.assert_close(nearest, torch.ones(200, dtype=torch.float64), rtol=1e-6, atol=0)


def test_inside_the_ellipsoid_all_directions_meet_it():
    r, g = torch.ones(5).double(), normal(10, 5)
    torch.testing.assert_close(directions_support(r, 0.1 * torch.ones(5).double())(g), g.norm(dim=1))
    assert local_angular_dimension(torch.ones(100), torch.zeros(100)).value == pytest.approx(100, rel=0.01)
    assert local_dimension_limit(torch.ones(100).double(), 0.5).item() == pytest.approx(100)


def test_an_affine_subspace_of_n_dimensions_is_half_a_sphere_in_n_plus_1():
    D, n = 60, 20
    r = torch.cat([torch.full((n,), torch.inf), torch.full((D - n,), 1e-6)]).double()
    estimate = local_angular_dimension(r, normal(D), draws=4000)
    expected = (chi.mean(n + 1) / 2 + chi.mean(n) / 2) ** 2
    assert estimate.value == pytest.approx(expected, abs=5 * estimate.error)
    assert estimate.error < 0.1
    assert local_dimension_bound(r, 1.0).item() == pytest.approx(n)
    assert local_dimension_limit(r, 1.0).item() == pytest.approx(n)


def test_a_far_ellipsoid_is_as_wide_as_its_shadow():
    """From far away the projection is the ellipsoid without its extent along w_0, divided by R."""
    D, R = 40, 1e4
    r = torch.linspace(0.5, 2, D).double()
    w_0 = torch.zeros(D).double()
    w_0[0] = R
    r_seen = r.clone()
    r_seen[0] = 0
    estimate = local_angular_dimension(r, w_0, draws=2000)
    shadow = gaussian_width(ellipsoid_support(r_seen / R), D, draws=2000)
    assert math.sqrt(estimate.value) == pytest.approx(shadow.value, rel=1e-2)


SPECTRA = {"bimodal": torch.cat([torch.ones(150), torch.full((150,), 1e-3)]), "continuous": torch.logspace(-3, 0, 300)}


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_threshold_is_D_minus_the_local_dimension(spectrum):
    """Equation 3.3, with the bound (3.4) and the limit for large D."""
    eigenvalues = SPECTRA[spectrum].double()
    D, epsilon = len(eigenvalues), 5e-3
    r = radii(eigenvalues, epsilon)
    w_0 = normal(D, seed=5)
    local = local_angular_dimension(r, w_0 / w_0.norm(), draws=400)
    hits = (random_lowest_losses(eigenvalues, runs=15) <= epsilon).double().mean(0)
    median = int((hits >= 0.5).double().argmax())
    assert abs(median - (D - local.value)) < 0.04 * D
    assert local.value == pytest.approx(local_dimension_limit(r, 1.0).item(), abs=0.03 * D)
    assert 0 < local_dimension_bound(r, 1.0).item() < local.value


def test_the_limit_solves_its_equation():
    r, R = torch.rand(4, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.tensor([1.0, 3.0])
    x = local_dimension_limit(r[:, None], R)
    assert x.shape == (4, 2)
    torch.testing.assert_close(x, local_dimension_bound(r[:, None], R * (1 - x / 50).sqrt()))


def test_whole_numbers_cut_nothing_off():
    whole, R = torch.tensor([1, 2]), 1.9
    for function in (local_dimension_bound, local_dimension_limit):
        assert function(whole, R) == function(whole.double(), R)


def test_bad_arguments():
    with pytest.raises(ValueError, match="\\[D\\], D >= 2, got \\[3\\] and \\[2\\]"):
        directions_support(torch.ones(3), torch.ones(2))
    with pytest.raises(ValueError, match="`radii` must be above 0, the smallest is 0"):
        directions_support(torch.tensor([1.0, 0.0]), torch.ones(2))
    assert np.isfinite(directions_support(torch.ones(2), torch.ones(2))(normal(5, 2)).numpy()).all()
