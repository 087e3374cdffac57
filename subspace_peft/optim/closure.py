"""Closures: functions by which an optimiser evaluates the loss, checked and made repeatable."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .processes import mean_over_processes


NO_GRAPH = "does not require grad"  # torch says so when backward is called under no_grad


def repeatable(closure: Callable, model: nn.Module) -> Callable:
    """The closure of one step, of which every evaluation is of the same function.

    Evaluations after the first one see the random numbers of torch (dropout) and the buffers of the model (batch-norm
    statistics) that the first one saw, and leave both as the first one left them. So a line search compares losses of
    the same function, and a step advances statistics and random numbers once, however many trials it makes. The random
    numbers of Python and NumPy are not covered. Call it once a step: `optimizer.step(repeatable(closure, model))`.
    """
    first: list = []  # what the first evaluation saw

    def repeated():
        if first:
            with _restored(model, *first):
                return closure()
        buffers, states = _buffers(model), _random_states(model)
        value = closure()
        first.extend((buffers, states))
        return value

    return repeated


@contextmanager
def _restored(model: nn.Module, buffers: dict[str, Tensor], states: dict[torch.device, Tensor]):
    """Run with these buffers and random states; put back the present ones afterwards."""
    buffers_after, states_after = _buffers(model), _random_states(model)
    _set(model, buffers, states)
    try:
        yield
    finally:
        _set(model, buffers_after, states_after)


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: b.detach().clone() for name, b in model.named_buffers() if not _is_expanded(b)}


def _is_expanded(buffer: Tensor) -> bool:
    """Whether several entries are one place in memory, so that nothing can write to it."""
    sizes = zip(buffer.shape, buffer.stride(), strict=True) if buffer.layout == torch.strided else ()
    return any(size > 1 and not stride for size, stride in sizes)


@torch.no_grad()
def _set(model: nn.Module, buffers: dict[str, Tensor], states: dict[torch.device, Tensor]) -> None:
    for name, buffer in model.named_buffers():  # a forward may have made more of them, or another size
        if name in buffers and buffers[name].shape == buffer.shape:
            buffer.copy_(buffers[name])
    for device, state in states.items():
        (torch if device.type == "cpu" else torch.get_device_module(device)).set_rng_state(
            state, *(() if device.type == "cpu" else (device,))
        )


def _random_states(model: nn.Module) -> dict[torch.device, Tensor]:
    """The random states of the CPU, where masks may be drawn too, and of every device that holds part of the model."""
    devices = {tensor.device for tensors in (model.parameters(), model.buffers()) for tensor in tensors}
    states = {torch.device("cpu"): torch.get_rng_state()}
    for device in devices:
        if device.type not in ("cpu", "meta"):
            states[device] = torch.get_device_module(device).get_rng_state(device)
    return states


class Update:
    """The closure of one update: it returns the loss of its micro-batches, and computes gradients if they are enabled.

    Trainer decides how losses are accumulated and divided, and evaluates the micro-batches before it calls `step`: the
    first call of the closure returns these results. The loss is the mean over the processes.

    Args:
        accelerator: accelerate's Accelerator of the training.
    """

    def __init__(self, accelerator: Any):
        self.accelerator = accelerator
        self.model: nn.Module | None = None
        self.evaluations: list[Callable] = []
        self.results: list = []  # of Trainer's evaluations, until the first call uses them
        self.gradients: list[Tensor | None] = []

    def add(self, model: nn.Module, evaluation: Callable):
        """Add a micro-batch, and evaluate it for Trainer."""
        self.model = model
        self.evaluations.append(repeatable(evaluation, model))
        self.results.append(self.evaluations[-1]())
        self.versions = self._versions()
        return self.results[-1]

    def keep_gradients(self) -> None:
        """Keep the gradients of Trainer's evaluations, which an optimiser may clear before it calls the closure."""
        self.gradients = [p.grad for p in self._trained_parameters()]
        self.versions += [gradient._version for gradient in self.gradients if gradient is not None]

    def __call__(self):
        is_usable = self.results and self.versions == self._versions()
        results, gradients, self.results, self.gradients = self.results, self.gradients, [], []
        if not is_usable:
            del results, gradients  # free their graph before the next one is made
            results = self._evaluate()
        elif torch.is_grad_enabled():
            for parameter, gradient in zip(self._trained_parameters(), gradients, strict=True):
                parameter.grad = gradient
        if isinstance(results[0], tuple):
            return results[0]
        return self.accelerator.reduce(torch.stack(results).sum(), reduction="mean")

    def _trained_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def _versions(self) -> list[int]:
        return [p._version for p in (*self._trained_parameters(), *self.gradients) if p is not None]

    def _evaluate(self) -> list:
        if not torch.is_grad_enabled():
            with _without_backward(self.accelerator):
                return [evaluation() for evaluation in self.evaluations]
        self.model.zero_grad()
        *first, last = self.evaluations
        with self.accelerator.no_sync(self.model):
            results = [evaluation() for evaluation in first]
        return [*results, last()]


@contextmanager
def _without_backward(accelerator: Any) -> Iterator[None]:
    """Turn backward off: Trainer.training_step always calls it, but trials of a line search need no gradients."""
    accelerator.backward = lambda loss, **kwargs: None
    try:
        yield
    finally:
        del accelerator.backward


class Objective:
    """A closure as an objective: the loss, averaged over processes, with the gradients or without.

    Args:
        optimizer: The name of the optimiser in error messages.
        parameters: The parameters whose gradients are computed; earlier gradients are cleared.
    """

    def __init__(self, optimizer: str, parameters: Iterable[Tensor]):
        self.optimizer = optimizer
        self.parameters = list(parameters)
        self._always_backward = False

    def __call__(self, closure: Callable | None, gradient: bool) -> tuple[Tensor, bool]:
        """The loss, and whether the gradients were computed, which some closures always do.

        Raises:
            TypeError: if there is no closure, or it does not return a number.
            ValueError: if it returns several numbers, or leaves no gradients although `gradient` asks for them.
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
                    f"The closure must leave a gradient on every parameter of {self.optimizer}, one of shape "
                    f"{list(parameter.shape)} has none; call loss.backward() in it, and check that the parameter "
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


def trainable(params: Tensor | Iterable) -> list:
    """Those of the parameters that train, named ones as (name, parameter); all of them if none does.

    torch's optimisers pass over frozen parameters too, as `parameters()` of an adapted model has them.
    """
    params = [params] if isinstance(params, Tensor) else list(params)
    return [p for p in params if (p[1] if isinstance(p, tuple) else p).requires_grad] or params


def unnamed(params: Tensor | Iterable) -> list:
    """The same parameters, or groups of them, without names."""
    if isinstance(params, Tensor):
        return [params]
    groups = (p | {"params": unnamed(p["params"])} if isinstance(p, dict) else p for p in params)
    return [p[1] if isinstance(p, tuple) else p for p in groups]


def check_closure(closure: Callable | None, optimizer: str) -> None:
    if not callable(closure):
        raise TypeError(
            f"{optimizer} must be given a closure, because it evaluates the loss itself, got {closure}. Call "
            "step(closure); transformers' Trainer does not, so use subspace_peft.trainer.SubspaceTrainer instead."
        )


def refuse_scaled_gradients(optimizer: Optimizer) -> None:
    """Refuse GradScaler, which sets `grad_scale` while it steps an optimiser with `_step_supports_amp_scaling`."""
    if "grad_scale" in vars(optimizer):
        del optimizer.grad_scale, optimizer.found_inf
        raise ValueError(
            f"{type(optimizer).__name__} must be stepped without a gradient scaler, such as fp16 uses: it scales the "
            "gradients in the closure but not the loss; use bf16, or full precision."
        )


def scalar(loss: Tensor, optimizer: str) -> Tensor:
    if loss.numel() != 1:
        raise ValueError(
            f"The closure of {optimizer} must return one number as the loss, got shape {list(loss.shape)}; "
            "return loss.mean()."
        )
    return loss.reshape(())
