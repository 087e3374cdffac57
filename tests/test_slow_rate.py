"""The warning of a rate at which theta_d hardly moves."""

import warnings

import pytest
import torch

from subspace_peft import parameter_groups
from tests.cases import BY_NAME, theta_d, wrap


CASE = BY_NAME["mlp"]


def step(optimizer, model) -> list[str]:
    theta_d(model).grad = torch.ones_like(theta_d(model))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    return [str(each.message) for each in caught if "hardly moves" in str(each.message)]


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, torch.optim.RMSprop])
def test_trainers_default_is_too_low_and_said_once(kind):
    model = wrap(CASE)
    optimizer = kind([theta_d(model)], lr=5e-5)
    (message,) = step(optimizer, model)
    assert "5.0e-05" in message
    assert "parameter_groups(model, batch=batch, steps=steps)" in message
    assert not step(optimizer, model)


@pytest.mark.parametrize(
    ("kind", "lr", "changes"),
    [
        (torch.optim.AdamW, 1e-2, {}),
        (torch.optim.SGD, 5e-5, {}),
        (torch.optim.AdamW, 5e-5, {"projection": "identity", "d": None, "coordinates": "low_rank", "rank": 2}),
    ],
    ids=["learns", "sgd", "low rank"],
)
def test_what_is_not_warned_of(kind, lr, changes):
    model = wrap(CASE, **changes)
    assert not step(kind([theta_d(model)], lr=lr), model)


def test_the_rate_is_that_of_the_units_of_theta_d():
    model = wrap(CASE, normalization="columns", d=2)
    assert step(torch.optim.AdamW([theta_d(model)], lr=1e-3), model)
    model = wrap(CASE, d=2)
    assert not step(torch.optim.AdamW([theta_d(model)], lr=1e-3), model)


def test_a_rate_that_was_found_is_right_however_low_it_is():
    model, batch = wrap(CASE), CASE.batch()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e-3)
    (group,) = parameter_groups(model, batch=batch, steps=10**18)
    assert group["lr"] < 1e-4
    assert not step(torch.optim.AdamW([group]), model)
    other = wrap(CASE)
    assert step(torch.optim.AdamW([theta_d(other)], lr=group["lr"]), other)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate:UserWarning")
def test_a_parameter_that_is_listed_twice():
    model = wrap(CASE)
    assert len(step(torch.optim.AdamW([theta_d(model)] * 2, lr=1e-6), model)) == 1


def test_a_schedule_that_begins_at_zero():
    model = wrap(CASE)
    optimizer = torch.optim.AdamW([theta_d(model)], lr=1e-2)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    assert optimizer.param_groups[0]["lr"] == 0
    assert not step(optimizer, model)
