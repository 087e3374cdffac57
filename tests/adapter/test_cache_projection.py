"""How much of P is held, and how often the rest is drawn."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils._pytree import tree_leaves

from subspace_peft import SubspaceConfig
from subspace_peft.projections import Projection
from tests.cases import move, theta_d


SIDE = 160


def wrapped(projection, cache):
    torch.manual_seed(0)
    base = nn.Sequential(nn.LayerNorm(SIDE), *(nn.Linear(SIDE, SIDE) for _ in range(3)))
    config = SubspaceConfig(d=20, projection=projection, cache_projection=cache, target_modules=["1", "2", "3"])
    model = get_peft_model(base, config)
    move(model, size=0.01)
    return model


def drawn_bytes(model):
    tensors = [
        tensor
        for module in model.modules()
        for coordinates in getattr(module, "coordinates", {}).get("default", {}).values()
        for tensor in tree_leaves(list(coordinates.projections[""]._drawn.values()))
    ]
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("projection", ["fastfood", "fastjl", "sparse", "dense"])
def test_no_more_of_P_is_held_than_the_config_says(projection):
    results = []
    for cache, least, most in ((True, 3000, 2**23), (50_000, 0, 50_000), (0, 0, 0)):
        model = wrapped(projection, cache)
        y = model(torch.ones(2, SIDE))
        y.square().sum().backward()
        results.append((y.detach(), theta_d(model).grad))
        assert least <= drawn_bytes(model) <= most
    for y, grad in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(grad, results[0][1])


@pytest.mark.parametrize("projection", ["fastfood", "sparse"])
def test_a_step_draws_an_uncached_weight_twice(projection, monkeypatch):
    model = wrapped(projection, False)
    drawn = []
    draw = Projection._draw
    monkeypatch.setattr(Projection, "_draw", lambda self, device: drawn.append(self.rows.name) or draw(self, device))
    model(torch.ones(2, SIDE)).sum().backward()
    assert drawn.count("1.weight") <= 2
