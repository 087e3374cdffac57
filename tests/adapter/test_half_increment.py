"""Every projection in half precision: increments act within 1 % of the ideal, and gradients can be scaled."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from subspace_peft.projections import PROJECTIONS
from tests.cases import loss, move, settings, theta_d


SEEDED = [name for name in PROJECTIONS if name not in ("basis", "coordinate")]
HALF = [torch.bfloat16, torch.float16]


def adapted(projection: str, dtype: torch.dtype, coordinates: str):
    """A Linear with weights of 1, so that inputs which cancel leave the increment alone."""
    base = nn.Sequential(nn.Linear(64, 32)).to(dtype)
    with torch.no_grad():
        base[0].weight.fill_(1)
        base[0].bias.fill_(0)
    changes = {"coordinates": coordinates, "rank": 4 if coordinates == "low_rank" else None}
    d = None if projection == "identity" else 50
    return get_peft_model(base, settings(projection=projection, d=d, **changes)).eval()


def cancelling(dtype: torch.dtype) -> torch.Tensor:
    half = torch.randn(16, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    return torch.cat([half, -half], -1)


@pytest.mark.parametrize("coordinates", ["weight", "low_rank"])
@pytest.mark.parametrize("projection", SEEDED)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@torch.no_grad()
def test_an_increment_below_the_resolution_acts_within_one_percent(dtype, projection, coordinates):
    model = adapted(projection, dtype, coordinates)
    layer = model.base_model.model[0]
    move(model, size=1)
    theta_d(model).mul_(0.1 * torch.finfo(dtype).eps / layer.get_delta_weight("default").abs().max())
    increments = layer.increments(["default"])
    weight = layer.base_layer.weight
    assert torch.equal((weight + increments["weight"]).to(dtype), weight)
    ideal = cancelling(dtype).double() @ increments["weight"].double().T
    ideal += increments.get("bias", torch.zeros(())).double()
    assert ideal.norm() > 0
    output = model(cancelling(dtype))
    assert output.dtype == dtype
    assert (output.double() - ideal).norm() < 0.01 * ideal.norm()


@pytest.mark.parametrize("coordinates", ["weight", "low_rank"])
@pytest.mark.parametrize("projection", SEEDED)
def test_a_gradient_scaler_leaves_the_step_as_it_is(projection, coordinates):
    """float16 gradients would be lost without it; theta_d and its gradient are float32."""
    model = adapted(projection, torch.float16, coordinates).train()
    x = cancelling(torch.float16)
    loss(model, x).backward()
    gradient, start = theta_d(model).grad, theta_d(model).detach().clone()
    assert theta_d(model).dtype == gradient.dtype == torch.float32
    assert gradient.norm() > 0
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=2.0**8), torch.optim.SGD([theta_d(model)], lr=0.1)
    optimizer.zero_grad()
    scaler.scale(loss(model, x)).backward()
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(theta_d(model).detach() - start, -0.1 * gradient, rtol=1e-3, atol=1e-5)
