"""Spectra: angles known in closed form, their record, and what it refuses."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from subspace_peft import Spectra, SpectraCallback
from subspace_peft.spectra import bands, principal_angles, vector_angles
from tests.cases import close, normal
from tests.models import MLP


def orthogonal(n, p=None, seed=0):
    return torch.linalg.qr(normal(n, p or n, seed=seed)).Q


# -------------------------------------------------------------------------------------------------------------- angles


@pytest.mark.parametrize("angle", [0, 1e-12, 1e-9, 1e-5, 0.1, math.pi / 4, 1.0, math.pi / 2 - 1e-9, math.pi / 2])
def test_angles_of_known_rotations(angle):
    """Two planes in four dimensions with the angles 0 and `angle`; arccos would return 0 below 1e-8."""
    Q, c, s = orthogonal(4), math.cos(angle), math.sin(angle)
    B = Q @ torch.tensor([[c, 0], [0, 1], [s, 0], [0, 0]], dtype=torch.float64)
    close(principal_angles(Q[:, :2], B), [0, angle], atol=1e-15)
    close(vector_angles(Q[:, :2], -B), [angle, 0], atol=1e-15)


@given(n=st.integers(1, 12), p=st.integers(0, 12), q=st.integers(0, 12), seed=st.integers(0, 9))
def test_scipy_finds_the_same_angles(n, p, q, seed):
    A, B = orthogonal(n, min(p, n), seed=seed) if p else normal(n, 0), orthogonal(n, min(q, n), seed=seed + 10)
    B = B if q else normal(n, 0)
    angles = principal_angles(A, B)
    assert len(angles) == min(A.shape[1], B.shape[1])
    assert (angles.diff() >= 0).all()
    if len(angles):
        close(angles, np.sort(scipy.linalg.subspace_angles(A.numpy(), B.numpy())), atol=1e-12)
        close(angles, principal_angles(B, A), atol=1e-12)


def test_angles_do_not_depend_on_the_basis_of_a_subspace():
    A, B = orthogonal(9, 4), orthogonal(9, 4, seed=1)
    close(principal_angles(A, B), principal_angles(A @ orthogonal(4, seed=2), B @ orthogonal(4, seed=3)))
    close(principal_angles(A, A @ orthogonal(4, seed=2)), torch.zeros(4), atol=1e-14)


def test_bad_angles():
    A = orthogonal(5, 2)
    with pytest.raises(ValueError, match=r"`A` and `B` must be \[n, p\] and \[n, q\], got \[5, 2\] and \[4, 2\]"):
        principal_angles(A, A[:4])
    with pytest.raises(ValueError, match=r"columns of `B` must be orthonormal.*by 3; pass torch.linalg.qr\(B\).Q"):
        principal_angles(A, 2 * A)
    with pytest.raises(ValueError, match=r"both be \[n, q\], got \[5, 2\] and \[5, 1\]"):
        vector_angles(A, A[:, :1])


@pytest.mark.parametrize(
    ("q", "rank", "sizes"),
    [(10, 3, (3, 4, 3)), (6, 3, (3, 0, 3)), (5, 3, (3, 0, 2)), (3, 3, (3, 0, 0)), (2, 3, (2, 0, 0))],
)
def test_bands(q, rank, sizes):
    assert tuple(len(range(q)[band]) for band in bands(q, rank).values()) == sizes


# ------------------------------------------------------------------------------------------------------------ a record


def turned(angle, n=8, m=6):
    """U diag V^T whose first left and last right singular vectors turn by this angle into new directions."""
    U, V = orthogonal(n, n, seed=1), orthogonal(m, m, seed=2)
    c, s = math.cos(angle), math.sin(angle)
    U = torch.cat([c * U[:, :1] + s * U[:, -1:], U[:, 1:m]], 1)
    V[:, -2:] = V[:, -2:] @ torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    return U @ torch.diag(torch.tensor([9.0, 7, 5, 4, 2, 1], dtype=torch.float64) * (1 + angle)) @ V.T


@pytest.mark.parametrize("angle", [1e-13, 1e-6, 0.3])
def test_a_record_of_known_rotations(angle, tmp_path):
    spectra = Spectra(rank=1, folder=tmp_path)
    for t in range(3):
        spectra.add({"W": turned(t * angle), "b": torch.zeros(3)})
    assert spectra.steps == [0, 1, 2]
    assert spectra.weights == ["W"]
    sigma = torch.tensor([9.0, 7, 5, 4, 2, 1], dtype=torch.float64)
    close(spectra.singular_values("W"), torch.stack([sigma * (1 + t * angle) for t in range(3)]))
    turns, zero = angle * torch.arange(3.0).double()[:, None], torch.zeros(3, 1)
    close(spectra.angles("W", "left", "top"), turns, atol=1e-14)
    close(spectra.angles("W", "left", "middle"), zero.expand(3, 4), atol=1e-14)
    close(spectra.angles("W", "left", "bottom"), zero, atol=1e-14)
    close(spectra.angles("W", "right", "top"), zero, atol=1e-14)
    close(spectra.angles("W", "right", "bottom"), turns, atol=1e-14)
    close(spectra.angles("W", "right", "middle"), torch.cat([zero, zero, zero, turns], 1), atol=1e-14)
    close(spectra.vector_angles("W", "left"), torch.cat([turns, zero.expand(3, 5)], 1), atol=1e-14)
    close(spectra.vector_angles("W", "right"), torch.cat([zero.expand(3, 4), turns, turns], 1), atol=1e-14)
    loaded = Spectra(rank=1, folder=tmp_path)
    assert torch.equal(loaded.angles("W", "left", "top"), spectra.angles("W", "left", "top"))


def test_a_chosen_reference(tmp_path):
    spectra = Spectra(rank=1, reference=2, folder=tmp_path)
    for step in (0, 2, 5):
        spectra.add({"W": turned(0.1 * step)}, step)
    top = spectra.angles("W", "left", "top")[:, 0]
    assert top[0].isnan()
    close(top[1:], [0, 0.3], atol=1e-12)
    late = Spectra(rank=1, reference=3)
    late.add({"W": turned(0)}, 0)
    with pytest.raises(ValueError, match="must be recorded before later steps, got 4 and `reference` is 3"):
        late.add({"W": turned(0)}, 4)


def test_going_back(tmp_path):
    spectra = Spectra(rank=1, folder=tmp_path)
    for step in range(5):
        spectra.add({"W": turned(0.1 * step)}, step)
    spectra.add({"W": turned(0.7)}, 4)
    close(spectra.angles("W", "left", "top")[4], [0.7])
    with pytest.raises(ValueError, match=r"Steps must rise, got 2 after 4; call keep_until\(2\)"):
        spectra.add({"W": turned(0)}, 2)
    spectra.keep_until(2)
    loaded = Spectra(rank=1, folder=tmp_path)
    assert loaded.steps == spectra.steps == [0, 1, 2]
    loaded.add({"W": turned(0.5)})
    assert loaded.steps == [0, 1, 2, 3]
    close(loaded.angles("W", "left", "top")[3], [0.5])


def test_bad_records(tmp_path):
    spectra = Spectra(rank=2, folder=tmp_path)
    spectra.add(MLP())
    with pytest.raises(
        ValueError, match=r"must be of one model: `fc1.weight` gives shape \[7, 6\] .* shape \[10, 6\] in an earlier"
    ):
        spectra.add({"fc1.weight": torch.randn(7, 6), "fc2.weight": torch.randn(4, 10)})
    with pytest.raises(
        ValueError, match=r"must be of one model: `fc2.weight` gives no matrix in .* shape \[4\] in an earlier"
    ):
        spectra.add({"fc1.weight": torch.randn(10, 6)})
    with pytest.raises(ValueError, match="must be finite to have singular values, `W` is not at step 0"):
        Spectra(rank=1).add({"W": torch.full((2, 2), torch.nan)})
    with pytest.raises(ValueError, match="`rank` must be an integer of at least 1, got 0"):
        Spectra(rank=0)
    with pytest.raises(ValueError, match="`step` must be an integer of at least 0, got -1"):
        spectra.add(MLP(), -1)
    with pytest.raises(ValueError, match="`name` must be a recorded weight, 'W' is none of"):
        spectra.singular_values("W")
    with pytest.raises(ValueError, match=r"must be of one `rank`, '.*00000000.safetensors' is of 2, got 3; use that"):
        Spectra(rank=3, folder=tmp_path)
    with pytest.raises(ValueError, match=r"must be of one `reference`, '.*00000000.safetensors' is of 0, got 1; use"):
        Spectra(rank=2, folder=tmp_path, reference=1)
    assert Spectra(rank=2, folder=tmp_path).steps == [0]
    path = tmp_path / "00000000.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"must be a whole safetensors file, '.*00000000.safetensors' is damaged"):
        Spectra(rank=2, folder=tmp_path)


def test_unknown_names():
    spectra = Spectra(rank=2)
    spectra.add({"W": torch.eye(4)})
    with pytest.raises(ValueError, match="`side` must be one of left, right, got 'up'"):
        spectra.angles("W", "up", "top")
    with pytest.raises(ValueError, match="`side` must be one of left, right, got 'up'"):
        spectra.vector_angles("W", "up")
    with pytest.raises(ValueError, match="`band` must be one of top, middle, bottom, got 'centre'"):
        spectra.angles("W", "left", "centre")
    with pytest.raises(ValueError, match="`spectra` must be a Spectra, got 'folder'"):
        SpectraCallback("folder")
    with pytest.raises(ValueError, match="set `initial=True`"):
        SpectraCallback(Spectra(rank=2, reference=0), initial=False)
