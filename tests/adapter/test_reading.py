"""Reading: what is read from outside is made anew when it may have changed."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from tests.cases import settings, theta_d


@pytest.mark.parametrize(
    "changes",
    [{}, {"projection": "identity", "d": None}, {"projection": "sparse"}, {"coordinates": "low_rank", "rank": 2}],
    ids=str,
)
def test_what_is_read_follows_theta_d_however_it_changes(changes):
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), settings(**changes))
    layer = model.base_model.model[0]
    for change in (
        lambda: theta_d(model).add_(1),
        lambda: theta_d(model).data.mul_(2),
        model.double,
        lambda: theta_d(model).data.copy_(torch.ones_like(theta_d(model))),
        model.float,
    ):
        layer.weight.sum()  # in a graph, which no backward pass ends
        with torch.no_grad():
            change()
        moved = copy.deepcopy(model).merge_and_unload()[0].weight
        torch.testing.assert_close(layer.weight.detach().clone(), moved.detach(), rtol=1e-5, atol=1e-5)
