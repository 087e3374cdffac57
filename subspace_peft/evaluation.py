"""Evaluation: a model's outputs for one batch, with the model left as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


IGNORED = -100
"""The label of a token that the losses of torch and transformers leave out."""
ENTRIES = 2**22  # of the outputs that are compared: the logits of a vocabulary over a batch of tokens can be gigabytes


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


def are_logits(output: Any) -> bool:
    """A single tensor counts as such, and so does what comes after a loss in a tuple."""
    has_loss = isinstance(output, tuple) and len(output) > 1 and isinstance(output[0], Tensor) and not output[0].dim()
    return has_loss or isinstance(output, Tensor) or (isinstance(output, Mapping) and "logits" in output)


def output_rows(output: Any, features: list[Tensor], tokens: Tensor | None) -> list[Tensor]:
    """The outputs, and others: [samples, features] each, float32; where they are of tokens, those that count."""
    found = [f for f in (_first(output), *features) if f is not None]
    return [_thinned(f, tokens) for f in found]


def _thinned(f: Tensor, tokens: Tensor | None) -> Tensor:
    """Some of the rows that count, before they are copied: at most about ENTRIES entries."""
    rows = f.reshape(-1, f.shape[-1] if f.dim() > 1 else 1)
    if tokens is None or f.dim() < 3 or f.shape[:2] != tokens.shape:
        return rows[:: 1 + f.numel() // ENTRIES].float()
    counting = tokens.to(f.device).view(*tokens.shape, *(1,) * (f.dim() - 3)).expand(f.shape[:-1])
    at = counting.flatten().nonzero()[:, 0]
    return rows[at[:: 1 + len(at) * rows.shape[1] // ENTRIES]].float()


def _first(output: Any) -> Tensor | None:
    """`logits`, or the first tensor of floats that is not a single number."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() and output.dim() else None
    if isinstance(output, Mapping):
        output = [output["logits"]] if "logits" in output else list(output.values())
    found = (_first(each) for each in output) if isinstance(output, (tuple, list)) else ()
    return next((f for f in found if f is not None), None)


def tokens_of_loss(inputs: Any) -> Tensor | None:
    """The tokens whose outputs the loss reads, as far as a batch tells; None: all. [batch, tokens]

    No padding, whose outputs may be anything; and where tokens have labels, those whose own or next label counts:
    a causal model predicts the next token. Some trainers of TRL mark completions in place of labels.
    """
    names = ("attention_mask", "labels", "completion_mask")
    given = [inputs.get(name) if isinstance(inputs, Mapping) else None for name in names]
    seen, labels, read = (f if isinstance(f, Tensor) and f.dim() == 2 else None for f in given)
    read = read if labels is None else labels != IGNORED
    if read is None:
        tokens = None if seen is None else seen.bool()
    else:
        read = read.bool()
        read = torch.cat([read[:, :-1] | read[:, 1:], read[:, -1:]], 1)
        tokens = read & seen.bool() if seen is not None and seen.shape == read.shape else read
    return tokens if tokens is not None and tokens.any() else None
