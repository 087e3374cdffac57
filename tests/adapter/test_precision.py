"""A model in float64 computes in float64, whoever runs it; in half precision increments are exact to 1 %."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from subspace_peft.projections import PROJECTIONS
from tests.adapter.double import batch, double, functional, oracle
from tests.cases import BY_NAME, loss, move, settings, theta_d


IN_DOUBLE = ["dense", "sparse", "fastfood", "fastjl"]
EXACT = {"rtol": 0, "atol": 1e-13}


@pytest.mark.parametrize("normalization", ["rows", "columns"])
@pytest.mark.parametrize("projection", IN_DOUBLE)
@pytest.mark.parametrize("name", ["mlp", "convnet", "padded", "tied"])
def test_loss_and_gradient_are_the_oracles(name, projection, normalization):
    case = BY_NAME[name]
    model = double(case, projection=projection, normalization=normalization)
    t = theta_d(model).detach().clone().requires_grad_()
    expected = oracle(model, case)(t)
    expected.backward()
    value = loss(model, batch(case))
    value.backward()
    torch.testing.assert_close(value, expected, **EXACT)
    torch.testing.assert_close(theta_d(model).grad, t.grad, **EXACT)
    by_func, value = torch.func.grad_and_value(functional(model, case))(t.detach())
    torch.testing.assert_close(value, expected.detach(), **EXACT)
    torch.testing.assert_close(by_func, t.grad, **EXACT)


@pytest.mark.parametrize("projection", IN_DOUBLE)
@pytest.mark.parametrize("name", ["mlp", "convnet", "tied"])
def test_forward_mode_is_the_oracles(name, projection):
    case = BY_NAME[name]
    model = double(case, projection=projection)
    t = theta_d(model).detach().clone().requires_grad_()
    gradient = torch.autograd.grad(oracle(model, case)(t), t)[0]
    u = torch.randn(7, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    _, slope = torch.func.jvp(functional(model, case), (t.detach(),), (u,))
    torch.testing.assert_close(slope, gradient @ u, rtol=0, atol=1e-12)


def test_theta_d_has_the_float64_of_its_base():
    for dtype, expected in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        assert theta_d(get_peft_model(BY_NAME["mlp"].model().to(dtype), settings())).dtype == expected


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
