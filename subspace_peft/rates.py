"""Rates: the learning rates of theta_d, of a head that trains beside it, and of the factors that it moves."""

import re
from collections.abc import Callable
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import nn

from .evaluation import run
from .sensitivity import is_theta_d, sensitivity, trained_theta_d


RATE_OF_THE_STEP = (torch.optim.SGD, torch.optim.ASGD)
"""Optimisers whose step is proportional to the gradient."""
RATE_OF_THE_ENTRY = (
    torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax, torch.optim.Adagrad,
    torch.optim.RMSprop,
)  # fmt: skip
"""Optimisers whose step stays the same if every gradient of an entry is multiplied by one number."""
ADAM = re.compile("_?(Paged|Fused)?Adam")
IS_FOUND = "lr_is_found"
"""Marks a parameter group whose rate comes from `find_rates`, of which nobody needs to be warned."""


RELATIVE_STEP = 3.6
"""The rate of theta_d, times the sensitivity, times the fourth root of d and of the number of steps."""
FEWEST_STEPS = 100
"""Below it the rate is that of so many steps."""
HEAD_STEP = 1.5
"""How far a step of the head moves its outputs: the rate of the head, times its sensitivity."""
HEAD_TIMES = 10
"""The rate of other parameters over that of theta_d, where nothing is known of them."""


def is_like_adam(kind: type) -> bool:
    """Whether the rates that are found are those of this optimiser: of RATE_OF_THE_ENTRY, or called Adam elsewhere.

    bitsandbytes, torchao, apex and others have 8-bit, paged or fused ones. DAdaptAdam or GaLoreAdamW are others.
    """
    return issubclass(kind, RATE_OF_THE_ENTRY) or any(map(ADAM.match, (each.__name__ for each in kind.__mro__)))


def set_rate(group: dict[str, Any], lr: float) -> None:
    """Set the rate of a parameter group; torchao holds it in a tensor, which must stay."""
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


class Rates(NamedTuple):
    """Learning rates for Adam: of theta_d, and of the other parameters that train."""

    theta_d: float
    head: float


def relative_step(d: int, steps: int) -> float:
    """The rate of theta_d times the sensitivity."""
    return RELATIVE_STEP / (d * max(steps, FEWEST_STEPS)) ** 0.25


def find_rates(model: nn.Module, batch: Any, steps: int, forward: Callable[[nn.Module, Any], Any] = run) -> Rates:
    """The rates for Adam without a search, where they fall to zero over the training:

        theta_d: 3.6 / (s (d max(steps, 100))^(1/4))        head: 1.5 / (mean of |x|_1 or |x - mean x|_1)

    with s from `sensitivity`, and x what enters the head. In a random subspace the outputs of a model change by a
    share s sigma when theta_d moves by sigma, whatever d is. The rates that learn best move theta_d, over the
    training, to where that share is about one; docs/learning_rate.md has the measurements.

    Args:
        batch: The arguments of the model: a mapping, a tuple or a tensor; of some dozens of samples.
        steps: The number of updates of the whole training.
        forward: What gives the outputs of the model for the batch. Default: the model itself.

    Raises:
        ValueError: if `steps` is not positive, no theta_d trains, or the outputs do not depend on it or on the sample.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"`steps` must be the number of updates of the training, at least 1, got {steps!r}.")
    found = sensitivity(model, batch, forward)
    rate = relative_step(found.d, steps) / found.theta_d
    return Rates(rate, HEAD_TIMES * rate if found.head is None else HEAD_STEP / found.head)


def parameter_groups(
    model: nn.Module,
    lr: float | None = None,
    head_lr: float | None = None,
    weight_decay: float = 0.0,
    *,
    batch: Any = None,
    steps: int | None = None,
) -> list[dict[str, object]]:
    """Parameter groups for a torch optimiser: theta_d at `lr`, all other trainable parameters at `head_lr`.

        torch.optim.AdamW(parameter_groups(model, batch=batch, steps=1000))

    finds the rates; `lr` sets them. A freshly initialised head (`modules_to_save`) needs a rate far above that of
    theta_d, because the head has to move much and the pretrained weights little. Weight decay acts on the head alone:
    on theta_d it would pull the weights towards the origin.

    Args:
        lr: The rate of theta_d. Default: that of `find_rates(model, batch, steps)`.
        head_lr: The rate of the other parameters. Default: that of `find_rates`, or ten times a given `lr`.
        weight_decay: The weight decay of the other parameters.

    Raises:
        ValueError: if the model has no trainable theta_d, or there is neither `lr` nor a `batch` and `steps`.
    """
    theta_d = trained_theta_d(model)
    head = [p for name, p in model.named_parameters() if p.requires_grad and not is_theta_d(name)]
    is_found = lr is None
    if is_found:
        if batch is None or steps is None:
            raise ValueError(
                "`parameter_groups` must be given `batch` and `steps`, to find the rate of theta_d, or `lr`; got "
                f"neither `lr` nor {'`batch`' if batch is None else '`steps`'}."
            )
        lr, found = find_rates(model, batch, steps)
        head_lr = found if head_lr is None else head_lr
    groups = [{"params": theta_d, "lr": lr, "weight_decay": 0.0} | ({IS_FOUND: True} if is_found else {})]
    if head:
        head_lr = HEAD_TIMES * lr if head_lr is None else head_lr
        groups.append({"params": head, "lr": head_lr, "weight_decay": weight_decay})
    return groups


def gamma_for(rate: float, optimizer: type[torch.optim.Optimizer] | torch.optim.Optimizer) -> float:
    """The `gamma` of three factors with which U and V train at `rate` times the learning rate of W (Qu 2023).

        SubspaceConfig(..., factors=3, gamma=gamma_for(0.01, torch.optim.SGD), projection="identity")

    trains with the discrepant rate 0.01. An optimiser cannot split theta_d, one vector, into two parameter groups.
    Instead gamma multiplies the rows of P that move U and V, and with them their gradients:

        SGD (RATE_OF_THE_STEP)              rate = gamma^2
        Adam and others (RATE_OF_THE_ENTRY) rate = gamma, since they divide by the size of the gradients

    Raises:
        ValueError: if the rate is negative or not finite, or the optimiser is of neither kind.
    """
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not isfinite(rate) or rate < 0:
        raise ValueError(f"`rate` must be a finite number of at least 0, got {rate!r}; 1 trains all factors alike.")
    kind = optimizer if isinstance(optimizer, type) else type(optimizer)
    if issubclass(kind, RATE_OF_THE_STEP):
        return rate**0.5
    if issubclass(kind, RATE_OF_THE_ENTRY):
        return float(rate)
    known = ", ".join(kind.__name__ for kind in (*RATE_OF_THE_STEP, *RATE_OF_THE_ENTRY))
    raise ValueError(
        f"`optimizer` must be one whose step is known to scale with the gradient or not at all ({known}), got "
        f"{kind.__name__}; set `gamma` by hand."
    )
