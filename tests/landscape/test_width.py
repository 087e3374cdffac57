"""Gaussian width and Gordon's bound against closed forms."""

import math

import pytest
import torch
from scipy.stats import chi

from subspace_peft.landscape import (
    ellipsoid_support,
    ellipsoid_width_bounds,
    escape_probability,
    gaussian_width,
    radii,
)


def test_a_ball():
    D, r = 50, 3.0
    width = gaussian_width(ellipsoid_support(torch.full((D,), r)), D, draws=4000)
    assert width.value == pytest.approx(r * chi.mean(D), abs=5 * width.error)
    assert 0 < width.error < 0.01 * width.value
    assert width.value == pytest.approx(r * math.sqrt(D), rel=0.02)


def test_sets_that_are_not_centred():
    """A segment of length sqrt(2), between the unit vectors of two dimensions, at any offset."""
    expected = math.sqrt(2) / 2 * chi.mean(1)
    for offset in (0.0, 100.0):
        width = gaussian_width(lambda g, offset=offset: (g + offset * g.sum(1, keepdim=True)).amax(1), 2, draws=4000)
        assert width.value == pytest.approx(expected, abs=5 * width.error)
        assert width.error < 0.02


def test_more_draws_than_are_held_at_once():
    D = 2**18
    width = gaussian_width(ellipsoid_support(torch.ones(D)), D, draws=6, seed=1)
    assert width.value == pytest.approx(math.sqrt(D), rel=1e-2)


@pytest.mark.parametrize("spectrum", [[1.0] * 30, [10.0] + [0.1] * 29, [0.03 * i for i in range(1, 31)]], ids=len)
def test_ellipsoids_are_between_the_bounds_of_the_lemma(spectrum):
    r = torch.tensor(spectrum, dtype=torch.float64)
    width = gaussian_width(ellipsoid_support(r), len(r), draws=4000)
    low, high = ellipsoid_width_bounds(r)
    assert low.item() < width.value**2 < high.item()


def test_a_segment_attains_the_lower_bound_below_the_printed_one():
    r = torch.tensor([2.0, 0.0, 0.0])
    low, high = ellipsoid_width_bounds(r)
    assert low.item() == pytest.approx((2 * chi.mean(1)) ** 2)
    width = gaussian_width(ellipsoid_support(r), 3, draws=20_000)
    assert width.value**2 == pytest.approx(low.item(), rel=0.03)
    assert width.value**2 < math.sqrt(2 / math.pi) * high.item()


def test_the_upper_bound_of_a_sublevel_set_is_a_trace():
    """Corollary B.1: sum r_i^2 = 2 epsilon Tr(H^-1)."""
    eigenvalues, epsilon = torch.tensor([0.5, 1.0, 4.0]), torch.tensor([0.1, 1.0])
    high = ellipsoid_width_bounds(radii(eigenvalues, epsilon))[1]
    torch.testing.assert_close(high, 2 * epsilon * (1 / eigenvalues).sum())


def test_gordons_bound():
    assert escape_probability(100, 50, math.sqrt(60)) == 0  # k <= w^2
    assert escape_probability(100, 50, 7.0) == 0  # vacuous, though k > w^2
    k, w = 300, 5.0
    expected = 1 - 3.5 * math.exp(-((300 / math.sqrt(301) - 5) ** 2) / 18)
    assert escape_probability(1000, 1000 - k, w) == pytest.approx(expected)
    bounds = [escape_probability(1000, d, w) for d in range(0, 1001, 50)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] > 0.99
    assert bounds[-1] == 0


@pytest.mark.parametrize("n", [1, 20, 100])
def test_gordons_bound_for_a_subspace(n):
    """A random subspace of d dimensions meets the unit sphere of n dimensions if d + n > D."""
    D, w = 400, chi.mean(n)
    assert not any(escape_probability(D, d, w) for d in range(D - n + 1, D + 1))
    assert escape_probability(D, 0, w) > 0.9


def test_bad_arguments():
    with pytest.raises(ValueError, match="`draws` must be at least 2, got 1"):
        gaussian_width(ellipsoid_support(torch.ones(3)), 3, draws=1)
    with pytest.raises(ValueError, match="between 0 and D = 10 .* got d = 11"):
        escape_probability(10, 11, 1.0)
