"""Rates: the learning rates of theta_d, of a head that trains beside it, and of the factors that it moves."""

from math import isfinite

import torch
from torch import nn


RATE_OF_THE_STEP = (torch.optim.SGD, torch.optim.ASGD)
"""Optimisers whose step is proportional to the gradient."""
RATE_OF_THE_ENTRY = (
    torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax, torch.optim.Adagrad,
    torch.optim.RMSprop,
)  # fmt: skip
"""Optimisers whose step stays the same if every gradient of an entry is multiplied by one number."""


def parameter_groups(
    model: nn.Module, lr: float, head_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, object]]:
    """Parameter groups for a torch optimiser: theta_d at `lr`, all other trainable parameters at `head_lr`.

    A freshly initialised head (`modules_to_save`) needs a rate far above that of theta_d, because the head has to move
    much and the pretrained weights little. Weight decay acts on the head alone: on theta_d it would pull the weights
    towards the origin.

    Args:
        head_lr: The rate of the other parameters. Default: ten times `lr`.
        weight_decay: The weight decay of the other parameters.

    Raises:
        ValueError: if the model has no trainable theta_d.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    theta_d = [p for name, p in trainable if ".subspace_peft_theta_d." in f".{name}"]
    head = [p for name, p in trainable if ".subspace_peft_theta_d." not in f".{name}"]
    if not theta_d:
        raise ValueError("The model must have a trainable theta_d, it has none; wrap it with a SubspaceConfig first.")
    groups = [{"params": theta_d, "lr": lr, "weight_decay": 0.0}]
    if head:
        groups.append({"params": head, "lr": 10 * lr if head_lr is None else head_lr, "weight_decay": weight_decay})
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
