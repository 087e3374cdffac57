"""Components: a basis holds the left singular vectors of the samples, in any dtype and within any memory."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from sklearn.decomposition import PCA
from torch import nn

from subspace_peft import Trajectory
from tests.trajectory.walks import SHAPES, Allocations, D, flat, walk, write


def assert_same_columns(P, Q, tolerance=1e-5):
    """Up to the signs."""
    products = (P.double().T @ Q.double()).abs()
    torch.testing.assert_close(products, torch.eye(P.shape[1], dtype=torch.float64), rtol=0, atol=tolerance)


def assert_orthonormal(P, tolerance=1e-5):
    gram = P.double().T @ P.double()
    torch.testing.assert_close(gram, torch.eye(P.shape[1], dtype=torch.float64), rtol=0, atol=tolerance)


def matrix(W, center, increments, initial=True):
    """The matrix whose components are expected."""
    W = W.double()[:, 0 if initial else 1 :]
    W = W.diff(dim=1) if increments else W
    return W - W.mean(1, keepdim=True) if center else W


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("center", [True, False], ids=["centred", "raw"])
@pytest.mark.parametrize("increments", [False, True], ids=["points", "increments"])
def test_a_basis_is_the_left_singular_vectors(center, increments, dtype, tmp_path):
    W = walk(dtype=dtype)
    write(tmp_path, W)
    for initial in (True, False):
        trajectory = Trajectory(tmp_path, increments=increments, initial=initial)
        U, S, _ = torch.linalg.svd(matrix(W, center, increments, initial), full_matrices=False)
        basis = trajectory.basis(5, center=center)
        assert {name: tensor.shape for name, tensor in basis.items()} == {n: (*s, 5) for n, s in SHAPES.items()}
        assert_orthonormal(flat(basis))
        assert_same_columns(flat(basis), U[:, :5])
        torch.testing.assert_close(trajectory.singular_values(center)[:5], S[:5])


def test_ratios_are_those_of_pca(tmp_path):
    W = walk()
    trajectory = write(tmp_path, W)
    pca = PCA(svd_solver="full").fit(W.double().T.numpy())
    ratios = trajectory.explained_variance_ratio
    assert ratios.dtype == torch.float64
    torch.testing.assert_close(ratios, torch.from_numpy(pca.explained_variance_ratio_), rtol=1e-7, atol=1e-12)
    assert_same_columns(flat(trajectory.basis(4)), torch.from_numpy(pca.components_[:4].T.copy()))


@given(t=st.integers(2, 8), share=st.floats(0.05, 1), center=st.booleans(), increments=st.booleans())
def test_every_number_of_samples_and_columns(t, share, center, increments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trajectory")
    W = walk(t, seed=t)
    write(folder, W)
    most = t - increments - center
    trajectory = Trajectory(folder, increments=increments)
    if most < 1:
        with pytest.raises(ValueError, match="`d` must be at most 0"):
            trajectory.basis(1, center=center)
        return
    d = max(1, round(share * most))
    P = flat(trajectory.basis(d, center=center))
    assert_orthonormal(P)
    assert_same_columns(P, torch.linalg.svd(matrix(W, center, increments), full_matrices=False)[0][:, :d], 1e-4)


def test_columns_stay_orthonormal_where_the_spectrum_falls_far(tmp_path):
    """Singular values down to 1e-6 of the first: rounding hides their squares in a Gram matrix of float64."""
    U, _ = torch.linalg.qr(torch.randn(D, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    V, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
    W = U * 10 ** -torch.arange(0, 6.4, 0.8, dtype=torch.float64) @ V
    for center in (True, False):
        trajectory = write(tmp_path, W)
        P = flat(trajectory.basis(7, center=center, dtype=torch.float64))
        assert_orthonormal(P, 1e-10)
        assert_same_columns(P, torch.linalg.svd(matrix(W, center, False), full_matrices=False)[0][:, :7], 1e-3)


def test_signs_are_fixed(tmp_path):
    """The sample with the largest weight in a column has a positive weight, so a basis computed twice is the same."""
    W = walk()
    trajectory = write(tmp_path, W)
    P = flat(trajectory.basis(6)).double()
    weights = (matrix(W, True, False).T @ P) / trajectory.singular_values()[:6]
    assert (weights.gather(0, weights.abs().argmax(0, keepdim=True)) > 0).all()
    assert torch.equal(flat(Trajectory(tmp_path).basis(6)).double(), P)


def test_only_the_named_tensors_count(tmp_path):
    W = walk()
    trajectory = write(tmp_path, W)
    basis = trajectory.basis(3, names=["fc2.bias", "fc1.weight"])
    assert list(basis) == ["fc2.bias", "fc1.weight"]
    named = torch.cat([W[110:], W[:60]])
    U = torch.linalg.svd(matrix(named, True, False), full_matrices=False)[0]
    assert_same_columns(flat(basis), U[:, :3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_budget_gives_the_same(dtype, tmp_path):
    W = walk(dtype=dtype)
    trajectory = write(tmp_path, W)
    expected = flat(trajectory.basis(5, dtype=torch.float64))
    for memory in (500, 1000, 5000):
        small = Trajectory(tmp_path, memory=memory)
        torch.testing.assert_close(flat(small.basis(5, dtype=torch.float64)), expected, rtol=0, atol=1e-12)
        small.save_basis(tmp_path / "basis.safetensors", 5, dtype=torch.float64)
        saved = load_file(tmp_path / "basis.safetensors")
        torch.testing.assert_close(flat({n: saved[n] for n in SHAPES}), expected, rtol=0, atol=1e-12)


def test_the_budget_holds(tmp_path):
    model, trajectory = nn.Linear(500, 100), Trajectory(tmp_path, memory=200_000)
    for _ in range(12):
        nn.init.normal_(model.weight)
        trajectory.add(model)
    with Allocations() as allocations:
        trajectory.save_basis(tmp_path / "basis.safetensors", 6)
    assert 50_000 < allocations.peak <= 200_000
    assert 12 * 50_100 * 4 > 10 * 200_000


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_saved_basis_is_the_basis(dtype, tmp_path):
    trajectory = write(tmp_path, walk())
    trajectory.save_basis(tmp_path / "basis.safetensors", 5, dtype=dtype)
    saved, basis = load_file(tmp_path / "basis.safetensors"), trajectory.basis(5, dtype=dtype)
    assert set(saved) == set(basis)
    for name, tensor in basis.items():
        assert tensor.dtype == dtype
        assert torch.equal(saved[name], tensor)
    assert len(trajectory) == 9  # the basis is no sample


def test_a_new_sample_counts(tmp_path):
    W = walk()
    trajectory = write(tmp_path, W[:, :5])
    assert len(trajectory.singular_values()) == 5
    write(tmp_path, W[:, 5:])
    assert len(trajectory.singular_values()) == 9


@pytest.mark.parametrize(
    ("d", "center", "message"),
    [
        (
            4,
            True,
            "`d` must be at most 3, the dimensions that the 4 samples in .* span around their mean, got 4; lower",
        ),
        (5, False, "`d` must be at most 4, the dimensions that the 4 samples in .* span, got 5"),
        (0, True, "`d` must be an integer of at least 1, got 0"),
        (2.0, True, "`d` must be an integer of at least 1, got 2.0"),
    ],
    ids=str,
)
def test_a_bad_d(d, center, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write(tmp_path, walk(4)).basis(d, center=center)


def test_identical_samples(tmp_path):
    W = walk(1).expand(D, 5)
    trajectory = write(tmp_path, W)
    with pytest.raises(ValueError, match="`d` must be at most 0, the dimensions that the 5 samples"):
        trajectory.basis(1)
    with pytest.raises(ValueError, match="Samples must differ to have a variance, all 5 are identical"):
        _ = trajectory.explained_variance_ratio
    write(tmp_path, walk(3)[:, 1:])
    with pytest.raises(ValueError, match="`d` must be at most 2"):
        trajectory.basis(3)
    assert_orthonormal(flat(trajectory.basis(2)))


def test_one_sample(tmp_path):
    write(tmp_path, walk(1))
    with pytest.raises(ValueError, match="`increments` are differences of two samples or more"):
        Trajectory(tmp_path, increments=True).basis(1)
    with pytest.raises(ValueError, match="all 1 are identical"):
        _ = Trajectory(tmp_path).explained_variance_ratio
