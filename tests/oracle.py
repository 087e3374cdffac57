"""Oracle: a plain float64 model whose tensors are origin + P theta_d, its outputs and its gradient P^T g."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from subspace_peft.adapter.walk import find_vectors, unique_coordinates
from subspace_peft.coordinates import Coordinates, LowRank


Batch = Tensor | dict[str, Tensor]
Increment = Callable[[Tensor], Tensor]
"""theta_d -> the increment to one tensor, in float64."""


def in_dtype(batch: Batch, dtype: torch.dtype) -> Batch:
    if isinstance(batch, dict):
        return {name: in_dtype(tensor, dtype) for name, tensor in batch.items()}
    return batch.to(dtype) if batch.is_floating_point() else batch


def flat_outputs(model: nn.Module, batch: Batch) -> Tensor:
    """Every floating-point output of the model, after the same seed: float64, one dimension."""
    torch.manual_seed(2)
    outputs = model(**batch) if isinstance(batch, dict) else model(batch)
    return torch.cat([tensor.double().flatten() for tensor in _floats(outputs)])


def _floats(outputs: object) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor) and outputs.is_floating_point():
        yield outputs
    elif isinstance(outputs, dict | list | tuple):
        for value in outputs.values() if isinstance(outputs, dict) else outputs:
            yield from _floats(value)


def loss(outputs: Tensor) -> Tensor:
    """A loss to which every output contributes with another weight."""
    probe = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return (outputs * probe).sum() / outputs.numel() ** 0.5


@torch.no_grad()
def increments(model: nn.Module, adapter: str = "default") -> dict[str, Increment]:
    """How each target tensor moves, from the columns of P, which unit vectors read off."""
    vectors = find_vectors(model)
    units = torch.eye(len(vectors.subspace_peft_theta_d[adapter]), dtype=torch.float64) * vectors.scales[adapter]
    return {name: _increment(c, units) for name, c in unique_coordinates(model, adapter).items()}


def _increment(coordinates: Coordinates, units: Tensor) -> Increment:
    if not isinstance(coordinates, LowRank):
        columns = coordinates.increment(units)
        return lambda theta_d: torch.tensordot(theta_d, columns, 1)
    B, A = coordinates.factors(units)
    A_0 = coordinates.factors(torch.zeros_like(units[0]))[1]

    def product(theta_d: Tensor) -> Tensor:
        left, right = torch.tensordot(theta_d, B, 1), A_0 + torch.tensordot(theta_d, A - A_0, 1)
        return (left @ right).reshape(coordinates.shape)

    return product


def in_float64(plain: nn.Module) -> nn.Module:
    """A copy of the model. Grouped products of experts have no float64, so its experts run one after the other."""
    model = copy.deepcopy(plain).double()
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module._can_set_experts_implementation():
            module.set_experts_implementation("eager")
    return model


class Oracle:
    """The moved model, in float64 or rounded to the dtype of the base.

    Args:
        plain: The base before it was wrapped, which has never run: some models keep what they computed from weights.
        increments: How each tensor moves.
        theta_d: How far.
    """

    def __init__(self, plain: nn.Module, increments: dict[str, Increment], theta_d: Tensor, rounded: bool = False):
        self.increments, self.theta_d = increments, theta_d.detach().double()
        self.model = copy.deepcopy(plain) if rounded else in_float64(plain)
        with torch.no_grad():
            for name, increment in increments.items():
                parameter = self.model.get_parameter(name).requires_grad_()
                parameter.copy_(parameter.double() + increment(self.theta_d))

    def says(self, batch: Batch) -> dict[str, Tensor]:
        return says(self.model, batch, self.gradient)

    def gradient(self, loss: Tensor) -> Tensor:
        """P^T g, where the increment is linear; else the transposed derivative of the increment times g."""
        parameters = [self.model.get_parameter(name) for name in self.increments]
        g = torch.autograd.grad(loss, parameters, materialize_grads=True)
        theta_d = self.theta_d.clone().requires_grad_()
        moved = [increment(theta_d) for increment in self.increments.values()]
        return torch.autograd.grad(moved, theta_d, [tensor.double() for tensor in g])[0]


def says(model: nn.Module, batch: Batch, gradient: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """What a model says in training mode, and after it in evaluation mode, in which it is left.

    Args:
        gradient: That of a loss.
    """
    said = {}
    with torch.set_grad_enabled(gradient is not None):
        training = flat_outputs(model.train(), batch)
    said["outputs in training"] = training.detach()
    if gradient is not None:
        said["gradient"] = gradient(loss(training))
    with torch.no_grad():
        said["outputs"] = flat_outputs(model.eval(), batch)
    return said


def distances(said: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """|said - expected| / |expected|."""
    return {name: ((tensor - expected[name]).norm() / expected[name].norm()).item() for name, tensor in said.items()}
