"""Adapted models in float64, and the oracle: a plain copy of the base whose tensors are origin + P theta_d."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from subspace_peft.adapter.walk import find_vectors, unique_coordinates
from tests.cases import Case, loss, theta_d, wrap


def double(case: Case, d: int = 7, **changes) -> nn.Module:
    """The case's model and adapter in float64, theta_d with a value."""
    model = wrap(case, d=d, **changes).double()
    with torch.no_grad():
        vector = theta_d(model)
        vector.copy_(0.3 * torch.randn(vector.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    return model


def batch(case: Case) -> Tensor:
    x = case.batch()
    return x.double() if x.is_floating_point() else x


@torch.no_grad()
def matrix(model: nn.Module) -> dict[str, Tensor]:
    """The rows of P of each target tensor, read off from unit vectors, for weight coordinates: float64 [n, d]."""
    units = torch.eye(theta_d(model).numel(), dtype=torch.float64) * find_vectors(model).scales["default"]
    return {name: c.increment(units).flatten(1).T for name, c in unique_coordinates(model, "default").items()}


def oracle(model: nn.Module, case: Case) -> Callable[[Tensor], Tensor]:
    """theta_d -> the loss of a plain model with weights origin + P theta_d."""
    plain, P, x = case.model().double(), matrix(model), batch(case)

    def value(t: Tensor) -> Tensor:
        moved = {
            name: plain.get_parameter(name) + (rows @ t).view_as(plain.get_parameter(name)) for name, rows in P.items()
        }
        return loss(lambda y: torch.func.functional_call(plain, moved, y), x)

    return value


def functional(model: nn.Module, case: Case) -> Callable[[Tensor], Tensor]:
    """theta_d -> the loss of the adapted model, by torch.func.functional_call."""
    name = next(name for name, parameter in model.named_parameters() if parameter is theta_d(model))
    return lambda t: loss(lambda y: torch.func.functional_call(model, {name: t}, y), batch(case))


def difference_gradient(model: nn.Module, case: Case, h: float = 1e-6) -> Tensor:
    """The derivative of the loss by theta_d, from central differences."""
    vector, x, slopes = theta_d(model), batch(case), []
    for i in range(vector.numel()):
        with torch.no_grad():
            before, ends = vector[i].clone(), []
            for sign in (1, -1):
                vector[i] = before + sign * h
                ends.append(loss(model, x))
            vector[i] = before
        slopes.append((ends[0] - ends[1]) / (2 * h))
    return torch.stack(slopes)
