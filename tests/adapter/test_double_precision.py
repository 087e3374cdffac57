"""A model in float64 computes in float64, whoever runs it."""

import pytest
import torch
from peft import get_peft_model

from tests.adapter.double import batch, double, functional, oracle
from tests.cases import BY_NAME, loss, settings, theta_d


PROJECTIONS = ["dense", "sparse", "fastfood", "fastjl"]
EXACT = {"rtol": 0, "atol": 1e-13}


@pytest.mark.parametrize("normalization", ["rows", "columns"])
@pytest.mark.parametrize("projection", PROJECTIONS)
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


@pytest.mark.parametrize("projection", PROJECTIONS)
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
