"""Forward: the ways in which a layer runs its base module."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from subspace_peft import SubspaceConfig
from subspace_peft.adapter.layer import SubspaceLayer
from tests.cases import BY_NAME, REPLACED, REPLACED_TARGETS, move, outputs, replaced, run, theta_d, wrap
from tests.trajectory.walks import Allocations


def test_a_layer_with_a_replaced_weight_runs_as_two_smaller_ones():
    """Neither the product nor its gradient is formed, and the weight is not read."""
    model = get_peft_model(
        nn.Sequential(nn.Linear(400, 300)),
        SubspaceConfig(**{**REPLACED, "target_modules": ["0"], "projection": "identity", "d": None}),
    )
    x = torch.randn(2, 400)
    model(x).sum().backward()
    with torch.no_grad():
        model.base_model.model[0].base_layer.weight.fill_(torch.nan)
    with FlopCounterMode(display=False) as flops, Allocations() as allocations:
        model(x).sum().backward()
    assert theta_d(model).grad.isfinite().all()
    assert flops.get_total_flops() <= 3 * 2 * 2 * 2 * (400 + 300)
    assert allocations.peak < 4 * 300 * 400


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mlp", "convnet", "embeddings"])
def test_replaced_weights_in_half_precision(name, dtype):
    case = BY_NAME[name]
    base = case.model().to(dtype)
    model = get_peft_model(base, SubspaceConfig(**{**REPLACED, "target_modules": REPLACED_TARGETS[name]})).eval()
    x = case.batch()
    output = run(model, x.to(dtype) if x.is_floating_point() else x)
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), outputs(replaced(name), case), rtol=0.1, atol=0.1)
    output.float().sum().backward()
    assert theta_d(model).grad.dtype == torch.float32
    assert theta_d(model).grad.isfinite().all()


def test_the_layer_of_a_linear_runs_low_rank_through_both_factors():
    """The product of size rows x columns is not formed where x can go through A and B in turn."""
    model = wrap(BY_NAME["mlp"], coordinates="low_rank", rank=2, d=9, parameters=["weight"])
    move(model)
    layer = model.base_model.model.fc1
    assert isinstance(layer, SubspaceLayer)
    assert isinstance(layer.base_layer, nn.Linear)
    formed = []
    layer.coordinates["default"]["weight"].increment = lambda z: formed.append(z)
    layer(torch.randn(2, 6))
    assert not formed
