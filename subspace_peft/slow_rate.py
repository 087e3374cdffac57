"""Slow rates: a warning, at the first step of an optimiser, where its rate is one at which theta_d cannot move."""

from __future__ import annotations

import warnings
import weakref
from math import sqrt

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from .rates import IS_FOUND, is_like_adam, relative_step


STEPS = 10_000
"""So many steps are more than most trainings of an adapter have: a rate too low for them is too low."""
LARGE_D = 20_000
"""The larger d is, the lower is its rate."""
MARGIN = 5.0
PER_INPUT = 0.5
"""The sensitivity over the root of the sum of the inputs of all layers: 0.4 to 0.6 in the networks measured."""

LEAST_INPUTS = 1000
"""Networks with fewer are toys, which train at any rate: with rows of norm 1 nothing is said from 4e-4 on."""

_watched: weakref.WeakKeyDictionary[nn.ParameterDict, float] = weakref.WeakKeyDictionary()
_seen: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
_hooks: list[RemovableHandle] = []


def watch(holder: nn.ParameterDict, inputs: int, row: float) -> None:
    """Warn at the first step of an optimiser like Adam that trains theta_d at a rate far below those that learn.

    Args:
        holder: Holds theta_d alone, in whose place FSDP may put another parameter.
        inputs: The number of inputs of the target matrices, added up.
        row: The root of the mean square norm of the rows of P.
    """
    least = relative_step(LARGE_D, STEPS) / (PER_INPUT * sqrt(max(inputs, LEAST_INPUTS)) * row * MARGIN)
    _watched[holder] = least
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_check))


def _check(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    if not _watched or optimizer in _seen:
        return
    _seen.add(optimizer)
    alive = [holder for each in _watched.keyrefs() if (holder := each()) is not None]  # another thread may add one
    holders = {id(theta_d): holder for holder in alive for theta_d in holder.values()}
    for group in optimizer.param_groups:
        rate = group.get("initial_lr", group.get("lr"))  # a schedule may begin at zero
        for parameter in group["params"]:
            holder = holders.get(id(parameter))
            least = 0.0 if holder is None else _watched.pop(holder, 0.0)
            if rate < least and is_like_adam(type(optimizer)) and not group.get(IS_FOUND):
                warnings.warn(
                    f"theta_d is trained at a learning rate of {float(rate):.1e}, at which it hardly moves in "
                    f"{STEPS:,} steps: rates below {least:.1e} are too low for this model. SubspaceTrainer finds the "
                    "rate, also in front of another trainer (class Tuner(SubspaceTrainer, SFTTrainer): pass); in a "
                    "loop of your own parameter_groups(model, batch=batch, steps=steps) does.",
                    stacklevel=2,
                )
