"""Quadratic wells against linear solves and closed forms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, kstest

from subspace_peft.landscape import (
    affine_distance,
    affine_threshold,
    lowest_losses,
    radii,
    random_lowest_losses,
    success,
)
from tests.cases import normal


def test_the_ellipsoid_is_the_sublevel_set():
    eigenvalues, epsilon = torch.tensor([4.0, 1.0, 0.0]), torch.tensor([0.5, 2.0])
    r = radii(eigenvalues, epsilon)
    assert r.shape == (2, 3)
    torch.testing.assert_close(r[0], torch.tensor([0.5, 1.0, torch.inf]))
    tips = torch.diag_embed(r[:, :2])
    torch.testing.assert_close((tips.square() * eigenvalues[:2]).sum(-1) / 2, epsilon[:, None].expand(2, 2))


def test_whole_numbers_cut_nothing_off():
    whole = torch.tensor([1, 4])
    assert torch.equal(radii(whole, 0.5), radii(whole.double(), 0.5))


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 12), st.data())
def test_the_lowest_loss_by_a_linear_solve(seed, D, data):
    d = data.draw(st.integers(0, D))
    eigenvalues = normal(D, seed=seed).abs() + 0.01
    w_0, A = normal(2, D, seed=seed + 1), normal(2, D, d, seed=seed + 2)
    lowest = lowest_losses(eigenvalues, w_0, A)
    assert lowest.shape == (2, d + 1)
    H = eigenvalues.diag()
    for run in range(2):
        for j in range(d + 1):
            P = A[run, :, :j]
            theta = -torch.linalg.solve(P.T @ H @ P, P.T @ H @ w_0[run])
            w = w_0[run] + P @ theta
            expected = (w @ H @ w / 2).item()
            assert lowest[run, j].item() == pytest.approx(expected, rel=1e-6, abs=1e-9 * lowest[run, 0].item())
    if d == D:
        assert not lowest[:, D].any()


def test_the_lowest_loss_by_gradient_descent():
    D, d = 20, 7
    eigenvalues, w_0, A = torch.linspace(0.5, 2, D).double(), normal(D), normal(D, d, seed=1) / D**0.5
    theta = torch.zeros(d, dtype=torch.float64, requires_grad=True)
    for _ in range(2000):
        w = w_0 + A @ theta
        loss = (eigenvalues * w.square()).sum() / 2
        (gradient,) = torch.autograd.grad(loss, theta)
        theta.data -= 0.3 * gradient
    assert lowest_losses(eigenvalues, w_0, A)[-1].item() == pytest.approx(loss.item(), rel=1e-8)


def test_success_is_the_share_of_runs_at_or_below_epsilon():
    eigenvalues = torch.logspace(-2, 0, 30).double()
    R, epsilon = torch.tensor([0.5, 2.0]), torch.tensor([1e-3, 1e-2, 0.1])
    P = success(eigenvalues, epsilon, R, runs=6, seed=3)
    assert P.shape == (2, 31, 3)
    lowest = random_lowest_losses(eigenvalues, runs=6, seed=3)
    assert P[1, 12, 1].item() == pytest.approx((4 * lowest[:, 12] <= 0.01).double().mean().item())
    assert (P.diff(dim=1) >= 0).all()  # more dimensions
    assert (P.diff(dim=2) >= 0).all()  # a higher loss
    assert (P[0] >= P[1]).all()  # a shorter distance
    assert (P[:, 30] == 1).all()
    assert 0 < P.mean().item() < 1
    fewer = success(eigenvalues, epsilon, R, d=5, runs=6, seed=3)
    assert fewer.shape == (2, 6, 3)


def assert_affine_distances(squares: torch.Tensor, D: int, n: int) -> None:
    """The squared distance of a unit vector to the span of n + d random directions is Beta distributed.

    Args:
        squares: The squared distances for each d: [runs, D + 1].
    """
    threshold = affine_threshold(D, n)
    assert squares[:, threshold:].max() < 1e-18 < squares[:, threshold - 1].min()
    for d in range(threshold):
        exact = beta((D - n - d) / 2, (n + d) / 2)
        assert affine_distance(D, n, d) ** 2 == pytest.approx(exact.mean(), rel=1e-12)
        assert squares[:, d].mean().item() == pytest.approx(exact.mean(), abs=4 * exact.std() / len(squares) ** 0.5)
        assert kstest(squares[:, d], exact.cdf).pvalue > 1e-3
    assert affine_distance(D, n, threshold) == affine_distance(D, n, D) == 0


def test_two_affine_subspaces_meet_from_the_threshold_on():
    """Both are random, neither lies along the axes."""
    D, n, runs = 12, 5, 1500
    A, B, offset = normal(runs, D, D, seed=1), normal(runs, D, n, seed=2), normal(runs, D, 1, seed=3)
    offset /= offset.norm(dim=1, keepdim=True)
    squares = []
    for d in range(D + 1):
        both = torch.linalg.qr(torch.cat([A[..., :d], B], 2)).Q
        squares.append((offset - both @ (both.mT @ offset)).square().sum((1, 2)))
    assert_affine_distances(torch.stack(squares, 1), D, n)


def test_a_flat_well_is_an_affine_subspace():
    D, n = 40, 15
    eigenvalues = torch.cat([torch.zeros(n), torch.ones(D - n)]).double()
    assert_affine_distances(2 * random_lowest_losses(eigenvalues, runs=500), D, n)


def test_bad_arguments():
    eigenvalues = torch.ones(3)
    with pytest.raises(ValueError, match="at least 0, the smallest is -1; leave out the directions of negative"):
        radii(torch.tensor([1.0, -1.0]), 1.0)
    with pytest.raises(ValueError, match="`epsilon` must be above 0, .* got 0"):
        radii(eigenvalues, torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="d <= D, .* got \\[3, 4\\], \\[3\\] and \\[3\\]"):
        lowest_losses(eigenvalues, torch.ones(3), torch.ones(3, 4))
    with pytest.raises(ValueError, match="got \\[2, 1\\], \\[3\\] and \\[3\\]"):
        lowest_losses(eigenvalues, torch.ones(3), torch.ones(2, 1))
