"""Caches: what modules compute from weights and keep in evaluation mode is of the weights of the moment."""

import copy

import pytest
import torch
from peft import inject_adapter_in_model
from torch import nn

from tests.cases import Case, floats, move, moved_base, outputs, settings, wrap


class Biased(nn.Module):
    """Keeps its biases in order from its first forward in evaluation mode on, as LeViT does."""

    def __init__(self):
        super().__init__()
        self.biases, self.order = nn.Parameter(torch.randn(4)), torch.tensor([2, 0, 3, 1, 1, 0])
        self.inner, self.cache = nn.Linear(6, 6), {}

    def train(self, mode=True):
        super().train(mode)
        if mode:
            self.cache = {}
        return self

    def forward(self, x):
        if self.training:
            return self.inner(x) + self.biases[self.order]
        if "biases" not in self.cache:
            self.cache["biases"] = self.biases[self.order]
        return self.inner(x) + self.cache["biases"]


class Early(Biased):
    """Computes them when it is set to evaluation mode, as TinyViT does."""

    def train(self, mode=True):
        super().train(mode)
        if not mode:
            self.cache = {"biases": self.biases.detach()[self.order]}
        return self


class Fused(nn.Module):
    """Keeps one matrix for two children, whose weights it reads."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.product = nn.Linear(6, 5, bias=False), nn.Linear(5, 6, bias=False), None

    def train(self, mode=True):
        super().train(mode)
        self.product = None
        return self

    def forward(self, x):
        if self.training:
            return self.second(self.first(x))
        if self.product is None:
            self.product = self.second.weight @ self.first.weight
        return x @ self.product.mT


CASES = [
    Case(kind.__name__, lambda kind=kind: nn.Sequential(kind(), nn.Tanh()), floats(3, 6))
    for kind in (Biased, Early, Fused)
]
every_case = pytest.mark.parametrize("case", CASES, ids=repr)


def base_outputs(case):
    return outputs(case.model().train().eval(), case)


def assert_moved(model, case, expected=None):
    expected = expected or moved_base(case, model).train().eval()
    torch.testing.assert_close(outputs(model, case), outputs(expected, case))


@every_case
def test_outputs_follow_theta_d_and_the_active_adapter(case):
    model = wrap(case)
    base = base_outputs(case)
    assert torch.equal(outputs(model, case), base)
    for size in (0.3, 0.6):
        move(model, size=size)
        assert_moved(model, case)
    expected = outputs(model, case)
    with model.disable_adapter():
        assert torch.equal(outputs(model, case), base)
    assert torch.equal(outputs(model, case), expected)
    model.add_adapter("other", settings(seed=1))
    model.set_adapter("other")
    assert torch.equal(outputs(model, case), base)
    model.set_adapter("default")
    assert torch.equal(outputs(model, case), expected)


@every_case
def test_a_merged_or_unloaded_model_computes_from_its_own_weights(case):
    model = wrap(case)
    move(model, size=0.3)
    outputs(model, case)
    expected = moved_base(case, model).train().eval()
    unloaded = copy.deepcopy(model).unload()
    assert torch.equal(outputs(unloaded, case), base_outputs(case))
    model.merge_adapter()
    assert_moved(model, case, expected)
    model.unmerge_adapter()
    assert_moved(model, case, expected)
    assert_moved(model.merge_and_unload(), case, expected)


@every_case
def test_a_copy_computes_from_its_own_theta_d(case):
    model = wrap(case)
    outputs(model, case)
    twin = copy.deepcopy(model)
    move(twin, size=0.3)
    assert_moved(twin, case)
    assert torch.equal(outputs(model, case), base_outputs(case))


def test_the_module_alone_follows_theta_d():
    case = CASES[1]
    model = inject_adapter_in_model(settings(), case.model())
    move(model, size=0.3)
    expected = moved_base(case, model).train().eval()
    torch.testing.assert_close(model[0](case.batch()), expected[0](case.batch()))


def test_each_submodule_keeps_its_mode():
    case = CASES[0]
    model = wrap(case)
    root = model.base_model.model
    root[0].base_layer.inner.train()
    modes = [module.training for module in root.modules()]
    outputs(model, case)
    assert [module.training for module in root.modules()] == modes
