"""The promises of every member of PROJECTIONS. A new member is tested by being listed there."""

import copy
import pickle
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subspace_peft.projections import PROJECTIONS
from subspace_peft.projections.recorded import is_recorded, unrecorded
from tests.projections.cases import explicit, make, random


pytestmark = pytest.mark.usefixtures("smallest_n")
SIZES = [(1, 1), (7, 3), (50, 200), (3000, 37), (1500, 170), (700, 1000), (400, 2100)]
RANDOM = ["dense", "sparse", "fastfood", "fastjl", "kronecker"]
CASES = [(name, n, d, None) for name in PROJECTIONS for n, d in SIZES]
CASES += [(name, n, d, 3) for name in ("sparse", "fastjl") for n, d in ((5, 3), (3000, 37), (700, 1000))]
CASES += [("kronecker", n, d, None) for n, d in ((256, 70), (3072, 700), (4224, 37), (9216, 300))]
SMALL = (
    [(name, 40, 12, None) for name in PROJECTIONS]
    + [("kronecker", 4224, 37, None)]
    + [("fastjl", 3000, 37, None), ("fastfood", 700, 300, None)]
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matrix(case):
    projection = make(*case)
    n, d = projection.rows.n, projection.rows.d
    P = explicit(projection)
    assert P.shape == (n, d)
    torch.testing.assert_close(projection.transpose(torch.eye(n, dtype=torch.float64)), P, rtol=0, atol=1e-11)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        z, g = random(d, dtype=dtype), random(n, dtype=dtype)
        torch.testing.assert_close(projection(z), (P @ z.double()).to(dtype), rtol=0, atol=tolerance * 3 * d**0.5)
        expected = (P.T @ g.double()).to(dtype)
        torch.testing.assert_close(projection.transpose(g), expected, rtol=0, atol=tolerance * 3 * n**0.5)
    torch.testing.assert_close(projection.column_square_norms(), P.square().sum(0), rtol=1e-6, atol=1e-9)
    assert projection.square_norm() == pytest.approx(P.square().sum().item(), rel=1e-6)
    assert projection.moved == (P != 0).any(1).sum()
    assert projection.moved == n or case[0] == "coordinate"


@pytest.mark.parametrize("n", [1, 63, 64, 512 + 127, 1023, 1024, 1025, 2048 + 64, 3000])
@pytest.mark.parametrize(("name", "nnz"), [("fastfood", None), ("fastjl", None), ("fastjl", 2)])
def test_column_norms_of_cropped_blocks(name, nnz, n, monkeypatch):
    projection = make(name, n, 1000, nnz)
    expected = explicit(projection).square().sum(0)
    torch.testing.assert_close(projection.column_square_norms(), expected, rtol=1e-13, atol=0)
    assert projection.square_norm() == pytest.approx(expected.sum().item(), rel=1e-13)
    monkeypatch.setattr("subspace_peft.projections.fastfood.MAX_PAIRS", 2**12)
    monkeypatch.setattr("subspace_peft.projections.blocks.SQUARES_AT_A_TIME", 2**14)
    torch.testing.assert_close(projection.column_square_norms(), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", PROJECTIONS)
@given(n=st.integers(1, 3000), d=st.integers(1, 300), seed=st.integers(0, 2**63))
@settings(max_examples=25, deadline=None)
def test_linear_with_exact_adjoint(name, n, d, seed):
    projection = make(name, n, d, seed=seed)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        z, g = random(2, projection.rows.d, dtype=dtype), random(n, dtype=dtype)
        y = projection(z)
        torch.testing.assert_close(projection(z[0] - 2 * z[1]), y[0] - 2 * y[1], rtol=0, atol=tolerance * 100 * d**0.5)
        up, down = y[0].double(), projection.transpose(g).double()
        error = up @ g.double() - z[0].double() @ down
        # cancellation may bring P z near zero (n = 1), but then P^T g is not small
        size = max(up.norm() * g.double().norm(), z[0].double().norm() * down.norm())
        assert error.abs() <= tolerance * size


@pytest.mark.parametrize("case", CASES, ids=str)
def test_batched(case):
    projection = make(*case)
    z, g = random(2, 3, projection.rows.d), random(2, 3, projection.rows.n)
    torch.testing.assert_close(projection(z)[1, 2], projection(z[1, 2]))
    torch.testing.assert_close(projection.transpose(g)[1, 2], projection.transpose(g[1, 2]))
    # strided, and expanded as in the backward pass of a sum
    torch.testing.assert_close(projection(z.transpose(0, 1)), projection(z).transpose(0, 1))
    torch.testing.assert_close(
        projection(random(projection.rows.d, 2).T)[1], projection(random(projection.rows.d, 2)[:, 1])
    )
    torch.testing.assert_close(projection.transpose(g.transpose(0, 1)), projection.transpose(g).transpose(0, 1))
    ones = torch.ones((), dtype=torch.float64).expand(projection.rows.n)
    torch.testing.assert_close(projection.transpose(ones), projection.transpose(ones.contiguous()))


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(case, dtype):
    projection = make(*case)
    z, g = random(projection.rows.d).to(dtype), random(projection.rows.n).to(dtype)
    assert torch.equal(projection(z), projection(z.float()).to(dtype))
    assert torch.equal(projection.transpose(g), projection.transpose(g.float()).to(dtype))


# torch's forward mode compiles its decompositions with torch.jit
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_derivatives(case):
    projection = make(*case)
    P, z = explicit(projection), random(projection.rows.d)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(transform(projection)(z), P)
    torch.testing.assert_close(torch.func.jacrev(projection.transpose)(random(projection.rows.n)), P.T)
    square = lambda z: projection(z).square().sum() / 2  # noqa: E731
    torch.testing.assert_close(torch.func.grad(square)(z), P.T @ (P @ z))
    torch.testing.assert_close(torch.func.hessian(square)(z), P.T @ P)
    per_sample = torch.vmap(torch.func.grad(square))(random(3, projection.rows.d))
    torch.testing.assert_close(per_sample[1], torch.func.grad(square)(random(3, projection.rows.d)[1]))
    columns = torch.vmap(projection, in_dims=1, out_dims=1)(random(projection.rows.d, 3))
    torch.testing.assert_close(columns, P @ random(projection.rows.d, 3))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(z, z + 1)
        tangent = torch.autograd.forward_ad.unpack_dual(projection(dual)).tangent
    torch.testing.assert_close(tangent, P @ (z + 1))


@pytest.mark.parametrize("name", PROJECTIONS)
def test_gradgradcheck(name):
    projection = make(name, 9, 4)
    z = random(projection.rows.d).requires_grad_()
    cubes = lambda z: projection(z) ** 3  # noqa: E731
    assert torch.autograd.gradcheck(cubes, z, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(cubes, z)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_compiles(case):
    projection = make(*case)
    z = random(projection.rows.d).requires_grad_()
    expected = torch.autograd.grad(projection(z).square().sum(), z)  # draws the state before compiling
    compiled = torch.compile(lambda z: projection(z).square().sum(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(z), z), expected)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_threads_that_draw_at_once_leave_nothing_behind():
    """The first to begin is the first to end: what it found is not what the other leaves."""
    begun, ended = threading.Event(), threading.Event()

    def second():
        with unrecorded():
            begun.set()
            ended.wait(timeout=60)

    thread = threading.Thread(target=second)
    with unrecorded():
        thread.start()
        assert begun.wait(timeout=60)
    ended.set()
    thread.join()
    seen = []
    torch.jit.trace(lambda x: seen.append(is_recorded()) or 2 * x, torch.ones(2))
    assert seen[0]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_saves_nothing_for_backward(case):
    projection = make(*case)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        y = projection(random(projection.rows.d).requires_grad_())
    assert y.requires_grad
    assert saved == []


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cache_changes_no_bit_and_copies_leave_it_out(case):
    projection, redrawn = make(*case), make(*case, cache=False)
    z, g = random(projection.rows.d, dtype=torch.float32), random(projection.rows.n, dtype=torch.float32)
    y, x = projection(z), projection.transpose(g)
    assert torch.equal(projection(z), y)
    assert redrawn._drawn == {}
    for other in (redrawn, pickle.loads(pickle.dumps(projection)), copy.deepcopy(projection)):
        assert other._drawn == {}
        assert torch.equal(other(z), y)
        assert torch.equal(other.transpose(g), x)
    assert torch.equal(redrawn.column_square_norms(), projection.column_square_norms())
    assert redrawn._drawn == {}


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_state_drawn_in_inference_mode_serves_training(case):
    projection = make(*case)
    with torch.inference_mode():
        projection(torch.zeros(projection.rows.d))
        projection.column_square_norms()
    z = random(projection.rows.d, dtype=torch.float32).requires_grad_()
    projection(z).square().sum().backward()
    assert z.grad is not None
    assert not projection(z.detach()).is_inference()


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize(("n", "d"), [(7, 3), (3000, 37), (700, 1000)])
def test_depends_on_seed_and_name_alone(name, n, d):
    P = explicit(make(name, n, d))
    assert torch.equal(explicit(make(name, n, d, offset=5, column=7)), P)
    for changes in ({"seed": 1}, {"name": "b.weight"}):
        other = explicit(make(name, n, d, **changes))
        assert (other != P).float().mean() > (0.2 if name != "sparse" else 0.2 / d)


@pytest.mark.parametrize("name", ["fastfood", "fastjl"])
@pytest.mark.parametrize(("n", "d"), [(3000, 37), (3000, 170), (700, 1000), (2500, 2100)])
def test_chunks_change_nothing(name, n, d, monkeypatch):
    z, g = random(2, d), random(2, n)
    projection = make(name, n, d)
    y, x = projection(z), projection.transpose(g)
    monkeypatch.setattr("subspace_peft.projections.blocks.ENTRIES_AT_A_TIME", 600)
    torch.testing.assert_close(projection(z), y)
    torch.testing.assert_close(projection.transpose(g), x)
    torch.testing.assert_close(projection(z[0]), y[0])
    torch.testing.assert_close(projection.transpose(g[0]), x[0])


@pytest.mark.parametrize("name", PROJECTIONS)
def test_refuses_a_newer_version(name):
    with pytest.raises(ValueError, match="install a newer subspace_peft"):
        make(name, 4, 3, version=99)
