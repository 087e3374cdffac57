"""Embeddings whose gradient torch computes in another way: sparse, or scaled by how often a token occurs."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from tests.adapter.double import batch, double, oracle
from tests.cases import REPLACED, Case, loss, outputs, refused, settings, theta_d, tokens, train, wrap


class Tokens(nn.Module):
    """An embedding and a bag of embeddings, each with these options."""

    def __init__(self, **options):
        super().__init__()
        self.tokens, self.bag = nn.Embedding(11, 4, **options), nn.EmbeddingBag(11, 4, mode="sum", **options)

    def forward(self, ids):
        return torch.tanh(self.tokens(ids) + self.bag(ids).unsqueeze(1))


def case(**options) -> Case:
    return Case("tokens", lambda: Tokens(**options), tokens(3, 9))


OPTIONS = {
    "sparse": {"sparse": True},
    "sparse with padding": {"sparse": True, "padding_idx": 5},
    "scaled": {"scale_grad_by_freq": True},
}


@pytest.mark.parametrize("projection", ["fastfood", "dense", "identity"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_gradient_is_the_plain_models(options, projection):
    d = None if projection == "identity" else 7
    model = double(case(**options), projection=projection, d=d)
    t = theta_d(model).detach().clone().requires_grad_()
    oracle(model, case(**options | {"sparse": False}))(t).backward()
    loss(model, batch(case())).backward()
    torch.testing.assert_close(theta_d(model).grad, t.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_low_rank_factors_get_the_gradient_of_their_product(options):
    """The oracle forms the product of the factors of the adapted model."""
    model, plain = double(case(**options), coordinates="low_rank", rank=2), case(**options | {"sparse": False})
    layers, plain = model.base_model.model, plain.model().double()
    moved = {
        f"{name}.weight": getattr(layers, name).base_layer.weight + getattr(layers, name).get_delta_weight("default")
        for name in ("tokens", "bag")
    }
    expected = loss(lambda ids: torch.func.functional_call(plain, moved, ids), batch(case()))
    gradient = torch.autograd.grad(expected, theta_d(model))[0]
    value = loss(model, batch(case()))
    value.backward()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(theta_d(model).grad, gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("changes", [{}, {"coordinates": "low_rank", "rank": 2}], ids=["weight", "low rank"])
def test_they_train_on_a_base_in_half_precision(options, changes):
    model = get_peft_model(case(**options).model().bfloat16(), settings(**changes))
    before = outputs(model.eval(), case())
    train(model, case())
    assert not torch.equal(outputs(model, case()), before)


class Reader(nn.Module):
    """Reads the weight of an embedding itself."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(11, 4, padding_idx=3)

    def forward(self, ids):
        return nn.functional.embedding(ids, self.tokens.weight, sparse=True)


def test_a_sparse_gradient_of_a_weight_that_is_read_is_the_plain_models():
    reader = Case("reader", Reader, tokens(3, 9))
    model = double(reader)
    layer = model.base_model.model.tokens
    weight = layer.moved(["default"])["weight"]
    loss(lambda ids: nn.functional.embedding(ids, weight), batch(reader)).backward()
    expected, theta_d(model).grad = theta_d(model).grad, None
    loss(model, batch(reader)).backward()
    torch.testing.assert_close(theta_d(model).grad, expected, rtol=0, atol=1e-12)


def test_they_stay_sparse_where_no_adapter_acts():
    model = wrap(case(sparse=True), target_modules=["tokens"])
    model(batch(case()))
    assert model.base_model.model.tokens.base_layer.sparse
    assert model.unload().tokens.sparse


def test_a_scaled_gradient_has_no_factors_to_replace_the_weight():
    model = case(scale_grad_by_freq=True).model()
    with refused(model, "but `tokens.weight` is of Embedding with scale_grad_by_freq"):
        get_peft_model(model, settings(**REPLACED, target_modules=["tokens"]))
