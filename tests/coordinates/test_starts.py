"""Starts: the factors of a low-rank tensor at theta_d = 0."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from subspace_peft.coordinates.starts import STARTS, FactorShapes, Increment, Start


CPU = torch.device("cpu")


def weight(rows=7, columns=12) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(4))


def made(kind, factors=2, rank=3, scaling=1.0, seed=0, W=None) -> Start:
    W = weight() if W is None else W
    start = kind("w", FactorShapes.of(tuple(W.shape), rank, factors), scaling, seed, 1)
    start.measure(W)
    return start


def product(start: Start) -> torch.Tensor:
    return start.scaling * torch.linalg.multi_dot([factor.double() for factor in start(CPU)])


@pytest.mark.parametrize("factors", [2, 3])
@pytest.mark.parametrize("name", STARTS)
def test_factors_have_their_shapes(name, factors):
    start = made(STARTS[name], factors)
    assert [tuple(factor.shape) for factor in start(CPU)] == list(start.shapes.parts.values())
    assert {factor.dtype for factor in start(CPU)} == {torch.float32}
    assert {key: tuple(tensor.shape) for key, tensor in start.measured.items()} == start.measured_shapes()


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), scaling=st.sampled_from([1.0, 0.25, -2.0]), data=st.data())
def test_svd_is_the_best_approximation(rows, columns, scaling, data):
    """Eckart and Young: the norm of the rest is that of the other singular values."""
    rank, factors = data.draw(st.integers(1, min(rows, columns))), data.draw(st.sampled_from([2, 3]))
    W = weight(rows, columns)
    rest = W - product(made(STARTS["svd"], factors, rank, scaling, W=W))
    values = torch.linalg.svdvals(W.double())[rank:]
    assert rest.norm().item() == pytest.approx(values.norm().item(), abs=1e-5)


@pytest.mark.parametrize("scaling", [1.0, 0.25, -2.0])
@pytest.mark.parametrize("factors", [2, 3])
@pytest.mark.parametrize("name", ["orthogonal", "random"])
def test_the_product_has_the_norm_of_the_weight(name, factors, scaling):
    start = made(STARTS[name], factors, scaling=scaling)
    assert product(start).norm().item() == pytest.approx(weight().norm().item(), rel=1e-5)


@pytest.mark.parametrize("factors", [2, 3])
def test_orthogonal_factors_are_orthogonal(factors):
    left, *inner, right = made(STARTS["orthogonal"], factors)(CPU)
    for Q in (left, right.mT):
        gram = Q.mT @ Q
        torch.testing.assert_close(gram, gram[0, 0] * torch.eye(3), rtol=1e-5, atol=1e-5)
    for W in inner:
        torch.testing.assert_close(W, W[0, 0] * torch.eye(3))
    values = torch.linalg.svdvals(product(made(STARTS["orthogonal"], factors)))
    torch.testing.assert_close(values[:3], values[:1].expand(3), rtol=1e-5, atol=0)


def test_random_factors_are_gaussian():
    for factor in made(STARTS["random"], rank=60, W=torch.ones(80, 90))(CPU):
        entries = (factor / factor.std()).flatten().double()
        assert abs(entries.mean()) < 5 / entries.numel() ** 0.5
        assert entries.pow(4).mean().item() == pytest.approx(3, abs=0.4)


def test_three_factors_of_an_increment_start_orthonormal_around_zero():
    U, W, V = made(Increment, 3)(CPU)
    assert W is None
    torch.testing.assert_close(U.mT @ U, torch.eye(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(V @ V.mT, torch.eye(3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", [Increment, STARTS["orthogonal"], STARTS["random"]])
def test_drawn_factors_are_of_the_seed_and_the_name(kind):
    same, again, other = made(kind), made(kind), made(kind, seed=1)
    renamed = kind("v", same.shapes, 1.0, 0, 1)
    renamed.measure(weight())
    assert torch.equal(same(CPU)[1], again(CPU)[1])
    assert not torch.equal(same(CPU)[1], other(CPU)[1])
    assert not torch.equal(same(CPU)[1], renamed(CPU)[1])


def test_a_start_is_drawn_once_and_pickled_without_its_factors():
    start = made(STARTS["orthogonal"])
    assert start(CPU)[0] is start(CPU)[0]
    for twin in (pickle.loads(pickle.dumps(start)), copy.deepcopy(start)):
        assert twin._drawn == {}
        assert torch.equal(twin(CPU)[0], start(CPU)[0])


@pytest.mark.parametrize("factors", [2, 3])
@pytest.mark.parametrize("rank_of_weight", [0, 1])
@pytest.mark.parametrize("name", STARTS)
def test_a_weight_of_lower_rank_leaves_no_pair_of_factors_zero(name, rank_of_weight, factors):
    W = weight()[:, :1] @ weight()[:1] * rank_of_weight
    start = made(STARTS[name], factors, W=W)
    assert product(start).norm().item() == pytest.approx(W.norm().item(), rel=1e-5)
    left, *_, right = start(CPU)
    assert ((left != 0).any(0) | (right != 0).any(1)).all()
    if factors == 3:  # the gradient of the inner one, U^T G V^T
        assert torch.linalg.matrix_rank(left) == torch.linalg.matrix_rank(right) == 3


@pytest.mark.parametrize("name", STARTS)
def test_a_weight_that_is_not_finite_is_refused(name):
    with pytest.raises(ValueError, match="must be finite to be replaced, `w` is not"):
        made(STARTS[name], W=weight() / 0)


def test_a_saved_start_wins_over_the_weight():
    start, other = made(STARTS["svd"]), made(STARTS["svd"], W=2 * weight())
    other(CPU)
    assert torch.equal(product(other.loaded(start.measured)), product(start))


def test_without_weight_or_file_there_is_no_start():
    start = STARTS["svd"]("w", FactorShapes(7, 12, 3), 1.0, 0, 1)
    with pytest.raises(
        ValueError, match="start of the factors of `w` must come with the adapter's file, but was not read"
    ):
        start(CPU)
