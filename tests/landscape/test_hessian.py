"""Hessian products, Lanczos and coverage against dense matrices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from subspace_peft.landscape import coverage, hessian_product, lanczos
from tests.cases import BY_NAME, theta_d, wrap
from tests.optim.problems import IMAGES, LABELS, PROBLEMS, network


def symmetric(n: int, seed: int = 0) -> torch.Tensor:
    A = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return A + A.T


# ------------------------------------------------------------------------------------------------------- Hessian


def test_products_with_the_dense_hessian():
    problem = PROBLEMS["network"]
    x = problem.parameter()
    x.data.normal_(generator=torch.Generator().manual_seed(0))
    H = torch.autograd.functional.hessian(problem.loss, x.detach())
    product = hessian_product(lambda: problem.loss(x), [x])
    columns = torch.stack([product(unit) for unit in torch.eye(30, dtype=torch.float64)])
    torch.testing.assert_close(columns, H)
    assert x.grad is None


def test_losses_of_batches_are_summed():
    x = PROBLEMS["network"].parameter()

    def batches(size):
        for at in range(0, 300, size):
            images, labels = IMAGES[at : at + size], LABELS[at : at + size]
            yield cross_entropy(network(x, images), labels) * len(images) / 300

    v = torch.randn(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(
        hessian_product(lambda: batches(100), [x])(v), hessian_product(lambda: batches(300), [x])(v)
    )


def test_several_tensors_some_without_curvature():
    a, b, unused = (torch.nn.Parameter(torch.ones(n)) for n in (2, 1, 3))
    product = hessian_product(lambda: a[0] ** 2 * b[0] + 5 * a[1], [a, b, unused])
    H = torch.zeros(6, 6)
    H[0, 0], H[0, 2], H[2, 0] = 2, 2, 2
    torch.testing.assert_close(torch.stack([product(unit) for unit in torch.eye(6)]), H)
    assert not hessian_product(lambda: a.sum(), [a, b])(torch.ones(3)).any()


def test_the_hessian_in_theta_d():
    """P^T H P, because double backward goes through the projection."""
    case = BY_NAME["mlp"]
    model = wrap(case, d=5)
    vector, x = theta_d(model), case.batch()
    product = hessian_product(lambda: model(x).square().mean(), [vector])
    H = torch.stack([product(unit) for unit in torch.eye(5)])
    assert H.abs().max().item() > 1e-3
    torch.testing.assert_close(H, H.T)
    step = 1e-3
    gradients = []
    for sign in (1, -1):
        vector.data.zero_()[0] = sign * step
        (gradient,) = torch.autograd.grad(model(x).square().mean(), vector)
        gradients.append(gradient)
    torch.testing.assert_close((gradients[0] - gradients[1]) / (2 * step), H[0], rtol=1e-2, atol=1e-3)


def test_a_vector_of_another_length():
    x = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="one number for each of the 2 parameters, got \\[3\\]"):
        hessian_product(lambda: x.sum(), [x])(torch.ones(3))


# --------------------------------------------------------------------------------------------------------- Lanczos


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 60), st.data())
def test_the_largest_eigenpairs(seed, n, data):
    k = data.draw(st.integers(1, n))
    A = symmetric(n, seed)
    values, vectors = lanczos(lambda v: A @ v, n, k, tol=1e-10, iterations=n, seed=seed)
    expected = torch.linalg.eigvalsh(A).flip(0)[:k]
    scale = A.norm().item()
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-8 * scale)
    torch.testing.assert_close(A @ vectors, vectors * values, rtol=0, atol=1e-8 * scale)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-10)


def test_far_fewer_products_than_rows():
    n, calls = 500, []
    spectrum = torch.cat([torch.linspace(-1, 1, n - 5), torch.tensor([10.0, 12, 14, 17, 20])]).double()

    def product(v):
        calls.append(1)
        return spectrum * v

    values, vectors = lanczos(product, n, 5)
    assert len(calls) < 60
    torch.testing.assert_close(values, spectrum[-5:].flip(0), rtol=1e-6, atol=0)
    assert coverage(torch.eye(n, dtype=torch.float64)[-5:], vectors) == pytest.approx(1)


@pytest.mark.parametrize("spectrum", [[3.0, 3, 3, 1, 1], [0.0] * 4, [5.0, 0, 0, 0], [-1.0, -2, -2]], ids=str)
def test_repeated_eigenvalues_and_invariant_subspaces(spectrum):
    spectrum = torch.tensor(spectrum, dtype=torch.float64)
    values, vectors = lanczos(lambda v: spectrum * v, len(spectrum), 3)
    torch.testing.assert_close(values, spectrum.sort(descending=True).values[:3])
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(3, dtype=torch.float64))


def test_single_precision_and_the_seed():
    A = symmetric(80).float()
    runs = [lanczos(lambda v: A @ v, 80, 4, tol=1e-5, dtype=torch.float32, seed=7) for _ in range(2)]
    assert torch.equal(runs[0][1], runs[1][1])
    assert runs[0][0].dtype == torch.float32
    torch.testing.assert_close(runs[0][0], torch.linalg.eigvalsh(A).flip(0)[:4], rtol=1e-4, atol=1e-4)


def test_errors_and_warnings_of_lanczos():
    A = symmetric(20)
    with pytest.raises(ValueError, match="`k` must be 1 to 20, the smaller of n and `iterations`, got 21; lower it"):
        lanczos(lambda v: A @ v, 20, 21)
    with pytest.raises(ValueError, match="`k` must be 1 to 3, .* got 4"):
        lanczos(lambda v: A @ v, 20, 4, iterations=3)
    with pytest.raises(FloatingPointError, match="number 1 is not"):
        lanczos(lambda v: v * float("nan"), 20, 4)
    with pytest.warns(UserWarning, match="After 5 products the residual is .* raise `iterations`"):
        lanczos(lambda v: A @ v, 20, 4, iterations=5)
    lanczos(lambda v: A @ v, 20, 4, iterations=5, tol=0)


# --------------------------------------------------------------------------------------------------------- coverage


def test_coverage_of_known_spans():
    E = torch.eye(5)
    assert coverage(E[:2], E[:, :2]) == pytest.approx(1)
    assert coverage(E[:2], E[:, 2:4]) == pytest.approx(0)
    assert coverage(E[:2], E[:, 1:3]) == pytest.approx(0.5)
    assert coverage(torch.stack([E[0] + E[1]]), E[:, :1]) == pytest.approx(0.5)
    assert coverage(torch.zeros(2, 5), E[:, :2]) == 0


@settings(max_examples=30)
@given(st.integers(0, 10**6))
def test_coverage_does_not_depend_on_the_bases(seed):
    generator = torch.Generator().manual_seed(seed)
    c, V, mix = (torch.randn(shape, generator=generator).double() for shape in ((3, 9), (9, 2), (3, 3)))
    share = coverage(c, V)
    assert 0 <= share <= 1 + 1e-12
    mix += 5 * torch.eye(3)
    assert coverage(torch.cat([1e-3 * mix @ c, c[:1]]), V * torch.tensor([1e4, 1.0])) == pytest.approx(share, abs=1e-8)


def test_coverage_of_a_random_subspace():
    generator = torch.Generator().manual_seed(0)
    shares = [
        coverage(torch.randn(10, 50, generator=generator), torch.randn(50, 5, generator=generator)) for _ in range(40)
    ]
    assert sum(shares) / 40 == pytest.approx(10 / 50, abs=0.02)


def test_bad_arguments_of_coverage():
    with pytest.raises(ValueError, match="one n, got \\[2, 5\\] and \\[4, 2\\]"):
        coverage(torch.ones(2, 5), torch.ones(4, 2))
    with pytest.raises(ValueError, match="must be finite"):
        coverage(torch.full((1, 3), float("nan")), torch.ones(3, 1))
    with pytest.raises(ValueError, match="`V` must span something"):
        coverage(torch.ones(1, 3), torch.zeros(3, 1))
