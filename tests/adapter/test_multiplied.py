"""Layers whose increment runs through the steps of a projection, beside those whose increment is formed."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from subspace_peft import SubspaceConfig
from subspace_peft.projections.kronecker import Kronecker
from tests.cases import theta_d


def network():
    """A classifier too small for a product after three layers that have one, of which the last has an odd size."""
    torch.manual_seed(0)
    layers = nn.Linear(256, 320), Conv1D(256, 320), nn.Linear(256, 331), nn.Linear(331, 5)
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.GELU())))


class Tied(nn.Module):
    """Token ids to logits by one weight, whose rows no factor divides."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.head = nn.Embedding(331, 256, **options), nn.Linear(256, 331, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.tokens(ids)))


def wrapped(base, **changes):
    config = {"d": 70, "projection": "kronecker", "target_modules": "all-linear"} | changes
    model = get_peft_model(copy.deepcopy(base), SubspaceConfig(**config))
    with torch.no_grad():
        theta_d(model).copy_(torch.randn(70, generator=torch.Generator().manual_seed(1)) / 100)
    return model


def oracle(base, model):
    """A plain copy with moved tensors, in float64."""
    moved = copy.deepcopy(base).double()
    for name, layer in model.base_model.model.named_children():
        for path, increment in getattr(layer, "increments", lambda _: {})(["default"]).items():
            tensor = moved.get_submodule(name).get_parameter(path)
            tensor.data += increment.detach().double()
    return moved


@pytest.fixture
def products(monkeypatch):
    """The number of inputs of each product that is made."""
    made, product = [], Kronecker.product
    monkeypatch.setattr(
        Kronecker, "product", lambda self, x, *args: made.append(x.shape[-1]) or product(self, x, *args)
    )
    return made


def test_the_layer_is_that_of_the_moved_tensors(products):
    base, x = network(), torch.randn(2, 7, 256)
    model = wrapped(base)
    y = model(x)
    assert products == [256, 320, 256]
    torch.testing.assert_close(y, oracle(base, model)(x.double()).float(), rtol=1e-4, atol=1e-5)
    found = torch.autograd.grad(y.square().sum(), theta_d(model))
    model.merge_adapter()
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    del products[:]
    with pytest.MonkeyPatch.context() as context:
        context.setattr(Kronecker, "has_product", False)
        expected = torch.autograd.grad(model(x).square().sum(), theta_d(model))
    assert products == []
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-2)


@pytest.fixture
def look_ups(monkeypatch):
    """The shape of the indices of each look-up that is made."""
    made, look_up = [], Kronecker.look_up
    monkeypatch.setattr(Kronecker, "look_up", lambda self, at, z: made.append(at.shape) or look_up(self, at, z))
    return made


@pytest.mark.parametrize("padding", [None, 0, 5, -1])
def test_an_embedding_looks_its_rows_up(padding, products, look_ups):
    """With padding, whose row has no rows in P, the tied output layer is formed."""
    base, ids = Tied(padding_idx=padding), torch.tensor([[0, 1, 330], [5, 6, 4]])
    model = wrapped(base, target_modules=["tokens", "head"])
    y = model(ids)
    assert (look_ups, products) == ([ids.shape], [256] if padding is None else [])
    moved = copy.deepcopy(base).double()
    increment = model.base_model.model.tokens.increments(["default"])["weight"]
    moved.tokens.weight.data += increment.detach().double()
    expected = moved(ids)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    expected.square().sum().backward()
    found = torch.autograd.grad(y.square().sum(), theta_d(model))[0]
    wanted = torch.autograd.grad(increment, theta_d(model), moved.tokens.weight.grad.float())[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3 * wanted.abs().max().item())


@pytest.mark.parametrize(
    ("options", "count"), [({}, 332), ({"scale_grad_by_freq": True}, 6)], ids=["many tokens", "scaled by frequency"]
)
def test_an_embedding_is_formed(options, count, look_ups):
    model = wrapped(nn.Sequential(nn.Embedding(331, 256, **options)), target_modules=["0"])
    model(torch.arange(count) % 331)
    assert look_ups == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_a_half_precision_embedding_are_rounded_once(dtype, look_ups):
    base, ids = nn.Sequential(nn.Embedding(331, 256)).to(dtype), torch.arange(331).repeat(2)
    model = wrapped(base, target_modules=["0"])
    increment = model.base_model.model[0].increments(["default"])["weight"]
    assert torch.equal(model(ids), (base[0].weight.float() + increment).to(dtype)[ids])
    assert len(look_ups) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_at_zero_it_is_the_base_to_the_bit(dtype):
    base, x = network().to(dtype), torch.randn(2, 7, 256, dtype=dtype)
    model = wrapped(base)
    nn.init.zeros_(theta_d(model))
    assert torch.equal(model(x), base(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_below_the_resolution_of_a_half_precision_base_it_acts(dtype, products):
    base, x = network().to(dtype)[:1], torch.randn(500, 256).to(dtype)
    model = wrapped(base, target_modules=["0"], parameters=["weight"])
    with torch.no_grad():
        theta_d(model).mul_(torch.finfo(dtype).eps)
        increment = model.base_model.model[0].increments(["default"])["weight"]
        y = model(x)
        ideal = (base(x).float() + x.float() @ increment.T).to(dtype)
    assert products == [256]
    assert increment.std() < torch.finfo(dtype).eps * base[0].weight.float().std()
    assert (y != base(x)).float().mean() > 0.1
    assert (y == ideal).float().mean() > 0.999


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_the_sum_alone(dtype, products):
    """The base multiplies in half precision, the steps of P in float32, forward and backward."""
    base, x, g = network()[:1], torch.randn(100, 256), torch.randn(100, 320).to(dtype)
    model = wrapped(base, target_modules=["0"], parameters=["weight"])
    increment = model.base_model.model[0].increments(["default"])["weight"]
    with torch.autocast("cpu", dtype):
        y, of_base = model(x), base(x)
    expected = x @ increment.T
    assert products == [256]
    assert (y == (of_base + expected).to(dtype)).float().mean() > 0.999
    found, wanted = (torch.autograd.grad(each, theta_d(model), g.to(each.dtype)) for each in (y, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_products_and_look_ups_are_recorded(products, look_ups):
    model, ids = wrapped(Tied(), target_modules=["tokens", "head"]), torch.tensor([[0, 1, 330], [5, 6, 4]])
    expected = model(ids)  # draws the state, which a whole graph cannot
    traced = torch.jit.trace(model, (ids,))
    for each in (ids, ids[:, :1]):  # for any number of tokens
        torch.testing.assert_close(traced(each), model(each), rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
    del products[:], look_ups[:]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids), expected, rtol=1e-5, atol=1e-5)
    assert (len(products), len(look_ups)) == (1, 1)
    torch._dynamo.reset()


def test_the_weight_of_the_base_is_not_read(products, monkeypatch):
    base = nn.Sequential(nn.Linear(256, 320))
    model = wrapped(base)
    layer = model.base_model.model[0]
    monkeypatch.setattr(nn.functional, "linear", lambda x, *_: x.new_zeros(*x.shape[:-1], 320))
    layer.base_layer.weight.data.fill_(torch.nan)
    y = model(torch.randn(3, 256))
    y.sum().backward()
    assert products == [256]
    assert y.isfinite().all()
    assert theta_d(model).grad.isfinite().all()


def test_two_adapters_of_which_one_is_formed_are_formed_together(products):
    base, x = network(), torch.randn(3, 256)
    model = wrapped(base)
    model.add_adapter(
        "other", SubspaceConfig(d=20, projection="fastjl", target_modules="all-linear", init_weights=False)
    )
    model.base_model.set_adapter(["default", "other"])
    y = model(x)
    assert products == []
    both = oracle(base, model)
    for name, layer in model.base_model.model.named_children():
        for path, increment in getattr(layer, "increments", lambda _: {})(["other"]).items():
            both.get_submodule(name).get_parameter(path).data += increment.detach().double()
    torch.testing.assert_close(y, both(x.double()).float(), rtol=1e-4, atol=1e-4)


def test_rows_of_padding_that_a_tied_output_layer_shares_stay(products):
    """The output layer's weight has a row without rows in P, which the product does not know."""
    base = nn.Sequential(nn.Embedding(265, 256, padding_idx=0), nn.Linear(256, 265, bias=False))
    base[1].weight = base[0].weight
    model = wrapped(base, target_modules=["0", "1"])
    ids = torch.tensor([[1, 2, 64, 0]])
    torch.testing.assert_close(
        model(ids)[..., 0], (model.base_model.model[0](ids) @ base[0].weight[0]), rtol=1e-4, atol=1e-4
    )
    assert products == []


def test_second_derivatives_where_the_input_depends_on_theta_d_too():
    base = nn.Sequential(nn.Linear(2304, 2304), nn.Tanh(), nn.Linear(2304, 2304))  # too large for a cache of P z
    model = wrapped(base, target_modules=["0", "2"])
    x = torch.randn(2, 2304, generator=torch.Generator().manual_seed(2))

    def gradient(create_graph):
        return torch.autograd.grad(model(x).square().mean(), theta_d(model), create_graph=create_graph)[0]

    first = gradient(create_graph=True)
    torch.testing.assert_close(first, gradient(create_graph=False), rtol=1e-5, atol=1e-7)
    v = torch.randn(70, generator=torch.Generator().manual_seed(3))
    (second,) = torch.autograd.grad(first @ v, theta_d(model))
    with torch.no_grad():
        theta_d(model).add_(v, alpha=1e-4)
        ahead = theta_d(model).detach().clone()
    later = gradient(create_graph=False)
    with torch.no_grad():
        theta_d(model).copy_(ahead - 2e-4 * v)
    torch.testing.assert_close(
        second, (later - gradient(create_graph=False)) / 2e-4, rtol=0.02, atol=0.02 * second.norm()
    )
