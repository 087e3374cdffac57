"""Sensitivity, against a linear network, where it is a ratio of two norms."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from subspace_peft import SubspaceConfig
from subspace_peft.sensitivity import DIRECTIONS, sensitivity
from tests.cases import BY_NAME, dense_P, settings, theta_d, wrap
from tests.models import MLP


X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


def linear(**changes):
    torch.manual_seed(0)
    return get_peft_model(nn.Sequential(nn.Linear(6, 4)), settings(d=5, target_modules=["0"], **changes))


@pytest.mark.parametrize("changes", [{}, {"normalization": "columns"}, {"projection": "sparse"}], ids=str)
def test_of_a_linear_layer(changes):
    model = linear(**changes)
    base, P = model.base_model.model[0].base_layer, dense_P(model)
    outputs = X @ base.weight.T + base.bias
    generator, slopes = torch.Generator().manual_seed(0), []
    for _ in range(DIRECTIONS):
        z = torch.randn(5, generator=generator)
        change = X @ (P["0.weight"] @ z).view(4, 6).T + P["0.bias"] @ z
        slopes.append(change.norm() / (outputs - outputs.mean(0)).norm())
    assert sensitivity(model, X).theta_d == pytest.approx(sum(slopes).item() / DIRECTIONS, rel=1e-3)


@pytest.mark.parametrize("case", ["bert", "convnet", "llama"])
def test_the_model_is_left_as_it_was(case):
    case = BY_NAME[case]
    model = wrap(case).train()
    with torch.no_grad():
        theta_d(model).normal_(std=1e-3)
    model.base_model.model.get_submodule(next(n for n, _ in model.base_model.model.named_children())).eval()
    modes = [module.training for module in model.modules()]
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    batch = case.batch()
    state = torch.get_rng_state()
    assert sensitivity(model, batch).theta_d > 0
    assert torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(random)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert theta_d(model).grad is None


def test_a_new_head_that_is_zero():
    model = get_peft_model(MLP(), settings(target_modules=["fc1"], modules_to_save=["fc2"]))
    hidden = model.base_model.model.fc1.base_layer(X).tanh()
    before = sensitivity(model, X)
    assert before.head == pytest.approx((hidden - hidden.mean(0)).abs().sum(1).mean().item(), rel=1e-4)
    with torch.no_grad():
        for parameter in model.base_model.model.fc2.modules_to_save["default"].parameters():
            parameter.zero_()
    after = sensitivity(model, X)
    assert 0 < after.theta_d <= before.theta_d
    assert after.head == before.head
    assert sensitivity(linear(), X).head is None


def test_large_outputs_are_compared_by_some_of_their_rows(monkeypatch):
    model, x = linear(), torch.randn(1000, 6, generator=torch.Generator().manual_seed(0))
    whole = sensitivity(model, x)
    monkeypatch.setattr("subspace_peft.sensitivity.ENTRIES", 1000)
    assert sensitivity(model, x).theta_d == pytest.approx(whole.theta_d, rel=0.1)


def test_what_has_none():
    with pytest.raises(ValueError, match="must have a trainable theta_d, it has none"):
        sensitivity(nn.Linear(6, 4), X)
    with pytest.raises(ValueError, match="samples with different outputs"):
        sensitivity(linear(), X[:1])
    network = nn.ModuleDict({"used": nn.Linear(6, 4), "unused": nn.Linear(6, 4)})
    network.forward = lambda x: network["used"](x)
    model = get_peft_model(network, SubspaceConfig(d=5, target_modules=["unused"]))
    with pytest.raises(ValueError, match="must depend on theta_d smoothly"):
        sensitivity(model, X)
    assert not theta_d(model).any()
