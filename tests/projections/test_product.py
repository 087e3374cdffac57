"""Product: x (P z)ᵀ, and rows of P z, without P z are what the formed P z gives."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from subspace_peft.projections import PROJECTIONS, TensorRows
from subspace_peft.projections.kronecker import block_count
from tests.projections.cases import explicit, random
from tests.trajectory.walks import Allocations


SHAPES = [(32, 48), (96, 64), (120, 400), (256, 256), (101, 256)]
pytestmark = pytest.mark.usefixtures("smallest_n")
SIDES = pytest.mark.parametrize("transposed", [False, True])


def kronecker(shape, d=37, **changes):
    rows = {"name": "w", "n": shape[0] * shape[1], "d": d, "shape": shape} | changes
    return PROJECTIONS["kronecker"](TensorRows(**rows))


def formed(projection, z, transposed):
    """The matrix that x is multiplied by from the right."""
    W = projection(z).view(projection.rows.shape)
    return W if transposed else W.T


def operands(projection, *batch, dtype=torch.float64, transposed=False):
    """x, z and a gradient of the product."""
    r, c = projection.rows.shape
    inputs, outputs = (r, c) if transposed else (c, r)
    x = random(*batch, inputs, dtype=dtype)
    return x, random(projection.rows.d, dtype=dtype) / 10, random(*batch, outputs, dtype=dtype)


@SIDES
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [(), (1,), (3, 5), (0,)])
def test_formed_and_unformed_agree(shape, batch, transposed):
    projection = kronecker(shape)
    assert projection.has_product
    x, z, g = operands(projection, *batch, transposed=transposed)
    x, z = x.requires_grad_(), z.requires_grad_()
    expected = x @ formed(projection, z, transposed)
    y = projection.product(x, z, transposed)
    torch.testing.assert_close(y, expected)
    found, wanted = (torch.autograd.grad(of, (x, z), g) for of in (y, expected))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [(), (3, 5), (0,)])
def test_looked_up_and_formed_rows_agree(shape, batch):
    projection = kronecker(shape)
    at = torch.randint(0, shape[0], batch, generator=torch.Generator().manual_seed(0))
    z = (random(37) / 10).requires_grad_()
    rows, expected = projection.look_up(at, z), projection(z).view(shape)[at]
    torch.testing.assert_close(rows, expected)
    g = random(*batch, shape[1])
    torch.testing.assert_close(torch.autograd.grad(rows, z, g), torch.autograd.grad(expected, z, g))
    check = {"check_forward_ad": True, "fast_mode": True}
    assert torch.autograd.gradcheck(lambda z: projection.look_up(at, z) / 10, z, **check)


def test_looked_up_rows_are_all_that_is_formed():
    projection = kronecker((8191, 256), d=70)
    at, z = torch.arange(20), random(70, dtype=torch.float32).requires_grad_()
    projection.look_up(at, z).sum().backward()  # draws the state
    with Allocations() as allocations:
        projection.look_up(at, z).sum().backward()
    assert projection.mixing.n == 16
    assert allocations.peak < 4 * 8191 * 256 / 2


def test_columns_of_cropped_rows_are_equally_long_and_nearly_orthogonal():
    """101 rows make 13 groups of 8, of which the last is cut after 5."""
    projection = kronecker((101, 256))
    P = explicit(projection)
    gram = P.T @ P
    torch.testing.assert_close(gram.diagonal(), projection.column_square_norms(), rtol=1e-12, atol=0)
    assert projection.column_square_norms().eq(101 * 256).all()
    assert projection.mixing.n == 8
    assert (gram - gram.diagonal().diag()).abs().max() < 0.05 * 101 * 256


def test_no_two_weights_move_together():
    """The n² sums of n entries ± of C differ by more than their sign. For n = 4 they cannot: there are 8 such sums."""
    projection = kronecker((256, 256), d=100)
    A, H, *_ = projection.mixing.matrices(random(1))
    sums = (A.sign().unsqueeze(1) * H).flatten(0, 1)
    assert torch.unique(sums * sums[:, :1], dim=0).shape[0] == 16**2
    assert torch.unique(projection.blocks(torch.eye(100)).T, dim=0).shape[0] == 256**2 / 16


@pytest.mark.parametrize(
    ("shape", "n"), [((50257, 768), 32), ((768, 50257), 1), ((30521, 384), 16), ((1000, 768), 16), ((10, 768), 1)]
)
def test_rows_of_any_number_are_mixed(shape, n, monkeypatch):
    """Vocabularies of GPT-2 and BERT (without its row of padding), and heads of 1000 and 10 classes."""
    monkeypatch.setattr("subspace_peft.projections.kronecker.SMALLEST_N", 16)
    assert block_count(*shape, 1000) == n


@SIDES
@pytest.mark.parametrize("shape", [(32, 48), (34, 48)])
def test_derivatives_of_every_kind(shape, transposed):
    projection = kronecker(shape)
    x, z, _ = operands(projection, 3, transposed=transposed)
    x, z = x.requires_grad_(), z.requires_grad_()
    function = lambda x, z: (projection.product(x, z, transposed) / 10) ** 3  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, z), check_forward_ad=True)
    assert projection.mixing.n == 4
    assert torch.autograd.gradgradcheck(function, (x, z), rtol=1e-2, check_fwd_over_rev=True)
    for wanted in (x, z):  # one of the two alone
        first = torch.autograd.grad(function(x, z).sum(), wanted, create_graph=True)[0]
        assert torch.autograd.grad(first.square().sum(), wanted)[0].isfinite().all()


@pytest.mark.parametrize("shape", [(32, 48), (34, 48)])
def test_torch_func(shape):
    projection = kronecker(shape)
    x, z, _ = operands(projection, 3)
    loss = lambda z, x: projection.product(x, z).square().sum()  # noqa: E731
    per_sample = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(z, x.unsqueeze(1))
    expected = torch.func.jacrev(lambda z: (x @ formed(projection, z, False)).square().sum(1))(z)
    torch.testing.assert_close(per_sample, expected)
    at = torch.tensor([0, 33, 1])
    rows = torch.vmap(lambda z, at: projection.look_up(at, z))(
        torch.stack([z, 2 * z]), torch.stack([at, at % 32]) % 32
    )
    W = projection(z).view(shape)
    torch.testing.assert_close(rows, torch.stack([W[at % 32], 2 * W[at % 32]]))


@pytest.mark.parametrize("shape", [(32, 48), (34, 48)])
def test_compiles(shape):
    projection = kronecker(shape)
    x, z, _ = operands(projection, 3)
    z = z.requires_grad_()
    expected = torch.autograd.grad(projection.product(x, z).square().sum(), z)  # draws the state before compiling
    compiled = torch.compile(lambda x, z: projection.product(x, z).square().sum(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(x, z), z), expected)
    torch._dynamo.reset()


def test_chunks_of_tokens_change_nothing(monkeypatch):
    projection = kronecker((96, 64))
    x, z, g = operands(projection, 23)
    x, z, output = x.requires_grad_(), z.requires_grad_(), random(23, 96).requires_grad_()
    y = projection.product(x, z, output=output)
    expected = torch.autograd.grad(y, (x, z, output), g)
    torch.testing.assert_close(expected[2], g)
    monkeypatch.setattr("subspace_peft.projections.product.ENTRIES_AT_A_TIME", 5 * 96)
    chunked = projection.product(x, z, output=output)
    torch.testing.assert_close(chunked, y)
    torch.testing.assert_close(torch.autograd.grad(chunked, (x, z, output), g), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    """x of half precision whose mixtures would overflow float16; the sum is computed in float32."""
    projection = kronecker((256, 256))
    x, z, _ = operands(projection, 4, dtype=torch.float32)
    x = (x.sign() * 60_000).to(dtype)
    z, output = z / 60_000, random(4, 256, dtype=torch.float32).to(dtype)
    expected = (output.float() + x.float() @ formed(projection, z, False)).to(dtype)
    y = projection.product(x, z, output=output)
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
    assert (y == expected).float().mean() > 0.999  # twice rounded, one in a hundred of bfloat16 would differ
    x, z = x.requires_grad_(), z.requires_grad_()
    gradients = torch.autograd.grad(projection.product(x, z, output=output).float().sum(), (x, z))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = projection.product(x, z, output=output)
        assert torch.equal(under, y)
        found = torch.autograd.grad(under.float().sum(), (x, z))
    assert all(torch.equal(one, other) for one, other in zip(found, gradients, strict=True))
    x, z = x.detach().float().requires_grad_(), z.detach().requires_grad_()
    plain = torch.autograd.grad((x @ formed(projection, z, False)).sum(), (x, z))
    torch.testing.assert_close(gradients[0].float(), plain[0], rtol=torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(gradients[1], plain[1], rtol=1e-4, atol=10)


def test_nothing_of_the_size_of_the_weight_is_formed_or_saved():
    projection = kronecker((512, 1024), d=70)
    x, z, g = operands(projection, 64, dtype=torch.float32)
    x, z = x.requires_grad_(), z.requires_grad_()
    projection.product(x, z).backward(g)  # draws the state
    saved = []
    with Allocations() as allocations, FlopCounterMode(display=False) as flops:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = projection.product(x, z)
        y.backward(g)
    assert {t.data_ptr() for t in saved} == {x.data_ptr(), z.data_ptr()}
    assert allocations.peak < 4 * 512 * 1024
    assert flops.get_total_flops() < 64 * 512 * 1024 * 2 * 3 / 3


def test_few_tokens_always_run_through_and_many_in_training():
    projection = kronecker((384, 384))
    assert projection.is_product_cheaper(10_000, trains=True)
    assert projection.is_product_cheaper(100, trains=False)
    assert not projection.is_product_cheaper(10_000, trains=False)
    assert projection.is_look_up_cheaper(384)
    assert not projection.is_look_up_cheaper(385)


def test_tensors_made_together_are_those_made_alone():
    shapes = [(96, 64), (5, 1), (32, 48), (300, 1)]
    parts = [kronecker(shape, d=70, name=str(i)) for i, shape in enumerate(shapes)]
    alone = [kronecker(shape, d=70, name=str(i)) for i, shape in enumerate(shapes)]
    cache = PROJECTIONS["kronecker"].together(parts)
    theta_d = nn.Parameter(random(70, dtype=torch.float32) / 10)
    z = cache.normalised(theta_d, 0.5)
    assert all(cache.entries(z, part.blocks) is not None for part in parts)
    x = random(3, 64, dtype=torch.float32)
    outputs = [*(part(z) for part in parts), parts[0].product(x, z)]
    expected = [*(part(theta_d * 0.5) for part in alone), alone[0].product(x, theta_d * 0.5)]
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)
    found, wanted = (torch.autograd.grad(sum(y.square().sum() for y in ys), theta_d) for ys in (outputs, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)
