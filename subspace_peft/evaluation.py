"""Evaluation: a model's outputs for one batch, with the model left as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; each of its modules is put back into the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def same_random(model: nn.Module) -> AbstractContextManager:
    """Torch's random numbers are afterwards as they were, so each time they begin as the time before."""
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    kind = next(iter(devices)).type if devices else "cuda"
    return torch.random.fork_rng(list(devices), device_type=kind)


def run(model: nn.Module, inputs: Any) -> Any:
    """What the model gives for keyword arguments (a mapping), arguments (a tuple or list) or one argument."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def moved(value: Any, device: torch.device | None) -> Any:
    """The value with its tensors on that device."""
    if isinstance(value, Tensor):
        return value if device is None else value.to(device)
    if isinstance(value, Mapping):
        return {key: moved(each, device) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        every = [moved(each, device) for each in value]
        return every if isinstance(value, list) else tuple(every)
    return value
