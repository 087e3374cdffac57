"""The scale: P is normalised over all of D."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from subspace_peft import SubspaceConfig
from subspace_peft.adapter.walk import find_vectors
from subspace_peft.projections import PROJECTIONS
from tests.cases import BY_NAME, dense_P, theta_d, wrap


CASE = BY_NAME["convnet"]


D = sum(p.numel() for p in CASE.model().parameters())


def given(projection: str) -> dict:
    """What a config needs beside the projection's name."""
    generator = torch.Generator().manual_seed(0)
    if projection == "basis":
        return {"d": 7, "basis": torch.linalg.qr(torch.randn(D, 7, generator=generator)).Q}
    if projection == "coordinate":
        return {"d": None, "mask": torch.rand(D, generator=generator) < 0.1}
    return {"d": None if projection == "identity" else 20}


def normalised_P(projection: str, normalization: str, **changes) -> torch.Tensor:  # [D, d]
    model = wrap(CASE, projection=projection, normalization=normalization, **given(projection), **changes)
    return torch.cat(list(dense_P(model).values())).double()


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_columns_have_unit_norm_over_all_of_D(projection):
    norms = normalised_P(projection, "columns").norm(dim=0)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-6, atol=0)


def test_a_column_of_zeros_moves_nothing_and_the_others_have_unit_norm():
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))
    targets = {"target_modules": "all", "parameters": "vectors"}
    config = SubspaceConfig(d=96, projection="sparse", normalization="columns", **targets)
    model = get_peft_model(base, config)
    norms = torch.cat(list(dense_P(model).values())).double().norm(dim=0)
    assert 0 < (norms == 0).sum() < 48
    torch.testing.assert_close(norms[norms > 0], torch.ones_like(norms[norms > 0]), rtol=1e-6, atol=0)
    model(torch.randn(8, 32)).square().sum().backward()
    assert torch.equal(theta_d(model).grad == 0, norms == 0)


@pytest.mark.parametrize("normalization", ["columns", "rows"])
def test_a_P_of_zeros_is_refused(normalization):
    drawn = {"projection": "fastjl", "nnz_per_row": 2, "seed": 1}  # two terms of opposite signs in each of two rows
    config = SubspaceConfig(d=1, normalization=normalization, target_modules=["0"], **drawn)
    with pytest.raises(ValueError, match="P must move something, it is zero for d = 1, .*; take another seed"):
        get_peft_model(nn.Sequential(nn.Linear(2, 1, bias=False)), config)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_rows_that_move_have_mean_square_norm_one(projection):
    squares = normalised_P(projection, "rows").square().sum(1)
    moving = squares[squares > 0]
    assert moving.mean().item() == pytest.approx(1, rel=1e-6)
    assert len(moving) == (given(projection)["mask"].sum() if projection == "coordinate" else D)


@pytest.mark.parametrize("projection", ["sparse", "fastjl"])
@pytest.mark.parametrize("normalization", ["rows", "columns"])
def test_both_normalisations_hold_for_several_non_zeros_a_row(projection, normalization):
    P = normalised_P(projection, normalization, nnz_per_row=3)
    value = P.norm(dim=0).max() if normalization == "columns" else P.square().sum(1).mean()
    assert value.item() == pytest.approx(1, rel=1e-6)
    if projection == "sparse":
        assert ((P != 0).sum(1) == 3).all()


@pytest.mark.parametrize("normalization", ["columns", "rows"])
@pytest.mark.parametrize("projection", ["identity", "coordinate"])
def test_unit_columns_cost_no_product(projection, normalization):
    model = wrap(CASE, projection=projection, normalization=normalization, **given(projection))
    vectors = find_vectors(model)
    assert vectors.normalised("default") is vectors.subspace_peft_theta_d["default"]


def test_unit_columns_of_a_basis_are_scaled_to_unit_rows():
    basis = torch.eye(D)[:, :7]
    P = torch.cat(list(dense_P(wrap(CASE, projection="basis", basis=basis, normalization="rows")).values()))
    assert P.square().sum().item() == pytest.approx(D, rel=1e-6)


@pytest.mark.parametrize("normalization", ["rows", "columns"])
def test_normalisation_is_over_all_of_theta(normalization):
    model = wrap(BY_NAME["convnet"], normalization=normalization, d=11)
    P = torch.cat(list(dense_P(model).values())).double()
    squares = P.square().sum(0 if normalization == "columns" else 1)
    if normalization == "columns":
        torch.testing.assert_close(squares, torch.ones(11, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    else:
        assert squares.mean().item() == pytest.approx(1, rel=1e-5)
