"""Promises of single members of PROJECTIONS, beyond the conformance matrix."""

import pytest
import torch
from scipy import stats
from torch.utils._pytree import tree_leaves

from subspace_peft.projections import PROJECTIONS, TensorRows
from subspace_peft.projections.hadamard import radices
from tests.projections.cases import explicit, make, random


def coherence(P):
    """The absolute cosines of all pairs of rows."""
    rows = P / P.norm(dim=1, keepdim=True)
    return (rows @ rows.T)[*torch.triu_indices(len(P), len(P), 1)].abs()


def test_dense_is_normal_and_its_columns_are_nested(monkeypatch):
    P = explicit(make("dense", 500, 60))
    assert stats.kstest(P.flatten().numpy(), "norm").pvalue > 1e-3
    assert torch.equal(explicit(make("dense", 500, 25)), P[:, :25])
    assert torch.equal(explicit(make("dense", 123, 60)), P[:123])
    monkeypatch.setattr("subspace_peft.projections.dense.ENTRIES_AT_A_TIME", 1000)
    assert torch.equal(explicit(make("dense", 500, 60)), P)


def test_dense_beyond_the_limit_is_not_held(monkeypatch):
    z, g = random(60), random(500)
    monkeypatch.setattr("subspace_peft.projections.dense.ENTRIES_AT_A_TIME", 1000)
    held = make("dense", 500, 60)
    y, x = held(z), held.transpose(g)
    assert len(held._drawn[z.device]) == 32
    monkeypatch.setattr("subspace_peft.projections.dense.HELD_BYTES", 4 * 500 * 60 - 1)
    redrawn = make("dense", 500, 60)
    assert torch.equal(redrawn(z), y)
    assert torch.equal(redrawn.transpose(g), x)
    assert redrawn._drawn[z.device] == ()
    assert torch.equal(redrawn.column_square_norms(), held.column_square_norms())


@pytest.mark.parametrize(("n", "d", "nnz"), [(1000, 37, 1), (1000, 37, 3), (1000, 37, 37), (5, 300, 2), (37, 37, 1)])
def test_sparse_is_balanced(n, d, nnz):
    P = explicit(make("sparse", n, d, nnz))
    assert torch.equal((P != 0).sum(1), torch.full((n,), nnz))
    assert P.abs().max() == 1
    uses = (P != 0).sum(0)
    spread = 1 if d % nnz == 0 else n // (d // nnz) + 1
    assert uses.max() - uses.min() <= spread
    if nnz == 1:
        assert uses.max() - uses.min() <= 1
    assert abs(P.sum()) < 4 * (n * nnz) ** 0.5


def test_sparse_drawn_in_parts_is_the_same(monkeypatch):
    P = explicit(make("sparse", 1000, 37, 3))
    monkeypatch.setattr("subspace_peft.projections.sparse.ENTRIES_AT_A_TIME", 100)
    assert torch.equal(explicit(make("sparse", 1000, 37, 3)), P)


@pytest.mark.parametrize("d", [10, 170, 290, 400])
@pytest.mark.parametrize("name", ["fastfood", "fastjl"])
def test_blocks_hold_at_most_8_bytes_an_entry(name, d):
    """Over a whole network, because a bias much smaller than d alone needs more."""
    lenet = [150, 6, 2400, 16, 30720, 120, 10080, 84, 840, 10]
    held = 0
    for n in lenet:
        leaves = tree_leaves(make(name, n, d).state(torch.device("cpu")))
        held += sum(tensor.untyped_storage().nbytes() for tensor in leaves)
    assert 0 < held <= 8 * sum(lenet)


def test_sparse_needs_a_column_for_each_entry():
    with pytest.raises(ValueError, match="`nnz_per_row` must be at most d = 3, got 4"):
        make("sparse", 10, 3, 4)


@pytest.mark.parametrize("d", [37, 64, 170, 1000])
def test_fastjl_is_signs_with_orthogonal_columns(d):
    projection = make("fastjl", 3 * 1024, d)
    P = explicit(projection)
    assert P.abs().eq(1).all()
    assert torch.equal(P.T @ P, projection.rows.n * torch.eye(d, dtype=torch.float64))


def test_every_tensor_reads_every_coordinate():
    for name in ("dense", "fastfood", "fastjl", "basis"):
        assert (explicit(make(name, 3, 200)) != 0).all()
    uses = sum((explicit(make("sparse", 3, 200, name=str(k))) != 0).sum(0) for k in range(300))
    assert (uses > 0).sum() > 190  # not the same three each time


@pytest.mark.parametrize(("name", "bound"), [("dense", 6), ("fastfood", 6.5), ("fastjl", 9), ("kronecker", 9)])
@pytest.mark.parametrize("d", [64, 170, 500])
def test_rows_are_incoherent(name, bound, d):
    cosines = coherence(explicit(make(name, 2000, d))) * d**0.5
    assert 0.7 < cosines.square().mean() < 1.3  # 1 for independent rows; pairs inside a block: 0 fastjl, 2 fastfood
    assert cosines.max() < bound


@pytest.mark.parametrize("name", ["dense", "sparse", "fastfood", "fastjl", "kronecker"])
def test_keeps_lengths(name):
    """|P^T g|^2 of unit vectors g of many kinds, relative to its mean d, spreads by about sqrt(2 / d)."""
    n, d = 4096, 256
    kinds = torch.stack(
        [
            torch.ones(n),  # constant
            (torch.arange(n) % 2 * 2.0 - 1),  # the fastest oscillation
            (torch.arange(n) < n // 2) * 2.0 - 1,  # the slowest
            torch.linspace(-1, 1, n),
            (torch.arange(n) < 16).float(),
            (torch.arange(n) % 256 == 0).float(),  # one column of a weight
            torch.outer(random(64), random(64)).flatten().float(),  # rank one
            torch.outer(random(64), torch.ones(64)).flatten().float(),  # from inputs that are constant
            random(n, dtype=torch.float32),
        ]
    )
    kinds = (kinds / kinds.norm(dim=1, keepdim=True)).double()
    lengths = torch.stack([make(name, n, d, seed=seed).transpose(kinds).square().sum(1) for seed in range(40)])
    scale = make(name, n, d).column_square_norms().sum() / n
    relative = lengths / scale
    assert (relative.mean(0) - 1).abs().max() < 0.12
    assert relative.std(0).max() < 4 * (2 / d) ** 0.5


def test_fastfood_rows_are_gaussian():
    P = explicit(make("fastfood", 2048, 128, name="k"))
    entries = P[:, ::17].flatten() / P.std()
    assert abs(entries.pow(4).mean() - 3) < 0.15
    norms = P.square().mean(1) / P.square().mean()
    assert 0.5 < norms.min() < norms.max() < 2


def test_radices_multiply_to_the_size():
    for k in range(24):
        sizes = radices(2**k)
        assert torch.tensor(sizes).prod() == 2**k
        assert max(sizes) <= 64


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (TensorRows("w", 5, 3, given=torch.ones(5, 4)), r"`basis` must have shape \(5, 3\) for w, got \(5, 4\)"),
        (TensorRows("w", 5, 3), r"`basis` must have shape \(5, 3\) for w, got None"),
    ],
)
def test_basis_of_another_shape(rows, message):
    with pytest.raises(ValueError, match=message):
        PROJECTIONS["basis"](rows)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_basis_keeps_its_dtype(dtype):
    given = random(20, 4).to(dtype)
    projection = PROJECTIONS["basis"](TensorRows("w", 20, 4, given=given))
    torch.testing.assert_close(explicit(projection), given.double())
    assert projection._drawn[given.device][0].dtype == dtype


@pytest.mark.parametrize(
    ("given", "column", "message"),
    [
        (torch.tensor([0, 2, 1]), 0, "sorted, distinct"),
        (torch.tensor([0, 1, 1]), 0, "sorted, distinct"),
        (torch.tensor([0, 1, 5]), 0, "below n = 5"),
        (torch.tensor([-1, 1]), 0, "sorted, distinct"),
        (torch.tensor([0, 1]), 2, "needs columns 2 to 4, but d = 3"),
        (torch.tensor([0.0, 1.0]), 0, "vector of integers"),
        (None, 0, "vector of integers"),
    ],
)
def test_coordinate_refuses(given, column, message):
    with pytest.raises(ValueError, match=message):
        PROJECTIONS["coordinate"](TensorRows("w", 5, 3, given=given, column=column))


def test_coordinate_of_no_position_moves_nothing():
    projection = PROJECTIONS["coordinate"](TensorRows("w", 5, 3, given=torch.tensor([], dtype=torch.int64)))
    assert projection.moved == 0
    assert torch.equal(projection(torch.ones(3)), torch.zeros(5))
    assert torch.equal(projection.transpose(torch.ones(5)), torch.zeros(3))


def test_identity_must_fit():
    with pytest.raises(ValueError, match="ends at entry 7, but d = 6"):
        PROJECTIONS["identity"](TensorRows("w", 5, 6, offset=2))
