"""Containers: targets that the model indexes and iterates over give it moved tensors."""

import copy
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from subspace_peft.adapter.container import ContainerLayer
from subspace_peft.adapter.layer import SubspaceLayer
from tests.cases import (
    Case,
    base_outputs,
    close,
    dense_P,
    floats,
    loss,
    move,
    moved_base,
    outputs,
    settings,
    theta_d,
    wrap,
)


class Lists(nn.Module):
    """Weights in a list, read by index, by slice and in a loop; one is no tensor."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(4, 4) for _ in range(3)])
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        assert len(self.weights) == 3
        assert self.weights
        x = x @ self.weights[0] + x @ self.weights[-1]
        for weight in self.weights:
            x = torch.tanh(x @ weight)
        return self.out(x @ sum(self.weights[1:]))


class Dictionaries(nn.Module):
    """Weights in a dictionary, read by key and by all its methods."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterDict({"first": torch.randn(4, 4), "second": torch.randn(4, 4)})
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        assert "first" in self.weights
        assert list(self.weights) == list(self.weights.keys()) == ["first", "second"]
        x = x @ self.weights["first"] + x @ self.weights.get("second")
        for weight in self.weights.values():
            x = torch.tanh(x @ weight)
        return self.out(x @ dict(self.weights.items())["second"])


class Table(nn.Module):
    """A module of the user's that is indexed, and has no other method of a container."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(3, 4))

    def __getitem__(self, i):
        return self.rows[i]


class Scaled(nn.Sequential):
    """Layers in a loop, with a scale beside them."""

    def __init__(self):
        super().__init__(nn.Linear(4, 4), nn.Linear(4, 4))
        self.scale = nn.Parameter(torch.rand(4) + 0.5)


class Steps(nn.Module):
    """A module that the model runs step by step, by a generator."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(4) + 0.5)

    def steps(self, x):
        for _ in range(3):
            x = torch.tanh(x * self.gain)
            yield x


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.scaled, self.steps = Table(), Scaled(), Steps()

    def forward(self, x):
        for layer in self.scaled:
            x = torch.tanh(layer(x)) * self.scaled.scale
        x = sum(self.steps.steps(x))
        return x * self.table[1] + sum(self.table) + self.scaled[0](x)


CASES = [Case(kind.__name__, kind, floats(3, 4)) for kind in (Lists, Dictionaries, Custom)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_model_reads_moved_items(case, tmp_path):
    model = wrap(case)
    assert torch.equal(outputs(model, case), base_outputs(case))
    move(model)
    plain = moved_base(case, model)
    close(outputs(model, case), outputs(plain, case), atol=1e-5)
    loss(model, case.batch()).backward()
    loss(plain, case.batch()).backward()
    expected = sum(P.mT @ plain.get_parameter(name).grad.flatten() for name, P in dense_P(model).items())
    close(theta_d(model).grad, expected, atol=1e-4, rtol=1e-4)
    with model.disable_adapter():
        assert torch.equal(outputs(model, case), base_outputs(case))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(case.model(), tmp_path).eval()
    assert torch.equal(outputs(again, case), outputs(model, case))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(twin, case), outputs(model, case))
    model.merge_adapter()
    close(outputs(model, case), outputs(plain, case), atol=1e-5)
    model.unmerge_adapter()
    close(outputs(model.unload(), case), base_outputs(case), atol=1e-5)


def test_only_containers_have_the_methods_of_one():
    layers = [module for module in wrap(CASES[2]).modules() if isinstance(module, SubspaceLayer)]
    assert [type(layer) for layer in layers] == [*[ContainerLayer] * 2, *[SubspaceLayer] * 3]
    with pytest.raises(TypeError):
        len(layers[0])
    with pytest.raises(TypeError):
        layers[2][0]
    with pytest.raises(IndexError):
        layers[0][3]
    assert all(layers)


def test_items_that_are_missing_are_missing():
    lists, dictionaries = (get_peft_model(case.model(), settings()) for case in CASES[:2])
    with pytest.raises(IndexError):
        lists.weights[3]
    assert dictionaries.weights.get("third") is None
    assert "third" not in dictionaries.weights
