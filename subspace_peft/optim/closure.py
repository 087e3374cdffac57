"""Closures: what an optimiser calls to evaluate the loss again, checked, and made to repeat themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .processes import mean_over_processes


NO_GRAPH = "does not require grad"  # in the message of torch where backward is called under no_grad


def repeatable(closure: Callable, model: nn.Module) -> Callable:
    """The closure of one step, for which every evaluation is of the same function.

    Evaluations after the first see the random numbers of torch (dropout) and the buffers of the model (batch-norm
    statistics) that the first one saw, and leave both as the first one left them: a line search compares like with
    like, and however many trials it makes, a step moves statistics and random numbers once. Python's and numpy's
    random numbers are not covered. Make a new one for each step: `optimizer.step(repeatable(closure, model))`.
    """
    seen: list = []

    def repeated():
        if seen:
            with _as_before(*seen):
                return closure()
        buffers = [buffer.detach().clone() for buffer in model.buffers()]
        states = _random_states(model)
        value = closure()
        seen.extend((model, buffers, states))
        return value

    return repeated


@contextmanager
def _as_before(model: nn.Module, buffers: list[Tensor], states: dict[torch.device, Tensor]):
    after = _random_states(model)
    buffers_after = [buffer.detach().clone() for buffer in model.buffers()]
    _set(model, buffers, states)
    try:
        yield
    finally:
        _set(model, buffers_after, after)


@torch.no_grad()
def _set(model: nn.Module, buffers: list[Tensor], states: dict[torch.device, Tensor]) -> None:
    for buffer, value in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(value)
    for device, state in states.items():
        (torch if device.type == "cpu" else torch.get_device_module(device)).set_rng_state(
            state, *(() if device.type == "cpu" else (device,))
        )


def _random_states(model: nn.Module) -> dict[torch.device, Tensor]:
    """Of the CPU, on which masks may be drawn too, and of every device that holds a part of the model."""
    devices = {tensor.device for tensors in (model.parameters(), model.buffers()) for tensor in tensors}
    states = {torch.device("cpu"): torch.get_rng_state()}
    for device in devices:
        if device.type not in ("cpu", "meta"):
            states[device] = torch.get_device_module(device).get_rng_state(device)
    return states


class Objective:
    """A closure as an objective: the loss, averaged over processes, with the gradients or without.

    Args:
        optimizer: The name that its messages give.
        parameters: Whose gradients it computes; they are cleared before, so that none is left from elsewhere.
    """

    def __init__(self, optimizer: str, parameters: Iterable[Tensor]):
        self.optimizer = optimizer
        self.parameters = list(parameters)
        self._always_backward = False

    def __call__(self, closure: Callable | None, gradient: bool) -> tuple[Tensor, bool]:
        """The loss, and whether the gradients were computed, which a closure may do unasked.

        Raises:
            TypeError: if there is no closure, or what it returns is no number.
            ValueError: if it returns several numbers, or leaves no gradients where they were asked for.
        """
        check_closure(closure, self.optimizer)
        if not gradient and not self._always_backward:
            try:
                with torch.no_grad():
                    return self._loss(closure()), False
            except RuntimeError as error:
                if NO_GRAPH not in str(error):
                    raise
                self._always_backward = True
        for parameter in self.parameters:
            parameter.grad = None
        with torch.enable_grad():
            loss = self._loss(closure())
        for parameter in self.parameters:
            if parameter.grad is None:
                raise ValueError(
                    f"The closure must leave a gradient on every parameter of {self.optimizer}, there is none on one "
                    f"of shape {list(parameter.shape)}; call loss.backward() in it, and check that the parameter "
                    "requires a gradient and that the model uses it."
                )
        return loss, True

    def _loss(self, value) -> Tensor:
        if isinstance(value, (int, float)):
            value = self.parameters[0].new_tensor(float(value))
        if not isinstance(value, Tensor):
            raise TypeError(
                f"The closure of {self.optimizer} must return the loss, got {type(value).__name__}; "
                "end it with `return loss`."
            )
        return mean_over_processes(scalar(value, self.optimizer))


def check_closure(closure: Callable | None, optimizer: str) -> None:
    if not callable(closure):
        raise TypeError(
            f"{optimizer} must be given a closure, got {closure}: it evaluates the loss itself. Call step(closure); "
            "in place of transformers' Trainer, which does not, take subspace_peft.trainer.SubspaceTrainer."
        )


def refuse_scaled_gradients(optimizer: Optimizer) -> None:
    """fp16's GradScaler sets `grad_scale` while it steps an optimiser that has `_step_supports_amp_scaling`."""
    if "grad_scale" in vars(optimizer):
        del optimizer.grad_scale, optimizer.found_inf
        raise ValueError(
            f"{type(optimizer).__name__} must be stepped without a gradient scaler, as fp16 has: the gradients in the "
            "closure are scaled, and the loss beside them is not; take bf16, or full precision."
        )


def scalar(loss: Tensor, optimizer: str) -> Tensor:
    if loss.numel() != 1:
        raise ValueError(
            f"The closure of {optimizer} must return one number as the loss, got shape {list(loss.shape)}; "
            "return loss.mean()."
        )
    return loss.reshape(())
