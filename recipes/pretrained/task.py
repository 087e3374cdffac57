"""What a pretrained model is fine-tuned on: a few training examples, and those that measure it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


HELD_OUT = 1000
"""The last so many training examples validate, where a data set has no validation set."""


class Task(NamedTuple):
    """What a model is trained and measured on, each batch as its `collate` makes it of examples."""

    training: Sequence
    validation: Sequence
    test: Sequence
    collate: Callable[[list], dict[str, Tensor]]
    classes: int
    longest: Any  # the training example that needs most memory
    order: str = "random"  # of the training examples, as Trainer calls it


def chosen(count: int, total: int, dataset: str) -> list[int]:
    """Which training examples, of `total`: the same for every seed; all, for a count of 0.

    Raises:
        ValueError: if there are fewer than asked for.
    """
    if count > total:
        raise ValueError(
            f"`examples` must be at most the {total} training examples of {dataset!r}, got {count}; lower it, or give "
            "0 for all."
        )
    return torch.randperm(total, generator=torch.Generator().manual_seed(0))[: count or total].tolist()
