"""Learning rates: theta_d, the factors that it moves, and what is trained beside it each want one of their own."""

from math import isfinite

import torch
from torch import nn


RATE_OF_THE_STEP = (torch.optim.SGD, torch.optim.ASGD)
"""Their step is the gradient times the rate."""
RATE_OF_THE_ENTRY = (
    torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax, torch.optim.Adagrad,
    torch.optim.RMSprop,
)  # fmt: skip
"""Their step does not change when all gradients of an entry are multiplied."""


def parameter_groups(
    model: nn.Module, lr: float, head_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, object]]:
    """Groups for a torch optimiser: theta_d at `lr`, all other trainable parameters at `head_lr`.

    A freshly initialised head (`modules_to_save`) wants a rate far above that of theta_d: the pretrained weights have
    to move little and the head much. Weight decay acts on the head alone: on theta_d it would pull towards the origin.

    Args:
        head_lr: Ten times `lr` if left out.

    Raises:
        ValueError: if the model has no theta_d that trains.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    theta_d = [p for name, p in trained if ".subspace_peft_theta_d." in f".{name}"]
    head = [p for name, p in trained if ".subspace_peft_theta_d." not in f".{name}"]
    if not theta_d:
        raise ValueError("The model must have a theta_d that trains, found none; wrap it with SubspaceConfig first.")
    groups = [{"params": theta_d, "lr": lr, "weight_decay": 0.0}]
    if head:
        groups.append({"params": head, "lr": 10 * lr if head_lr is None else head_lr, "weight_decay": weight_decay})
    return groups


def gamma_for(rate: float, optimizer: type[torch.optim.Optimizer] | torch.optim.Optimizer) -> float:
    """The `gamma` of three factors with which U and V train at `rate` times the learning rate of W (Qu 2023).

        SubspaceConfig(..., factors=3, gamma=gamma_for(0.01, torch.optim.SGD), projection="identity")

    has the discrepant rate 0.01. theta_d is one vector, which an optimiser cannot have in two parameter groups; so
    gamma multiplies the rows of P that move U and V, and their gradients with them: under SGD the rate is gamma^2,
    under Adam and its like, which divide by the gradients' size, it is gamma.

    Raises:
        ValueError: if the rate is negative or not finite, or the optimiser is of neither kind.
    """
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not isfinite(rate) or rate < 0:
        raise ValueError(f"`rate` must be a finite number of at least 0, got {rate!r}.")
    kind = optimizer if isinstance(optimizer, type) else type(optimizer)
    if issubclass(kind, RATE_OF_THE_STEP):
        return rate**0.5
    if issubclass(kind, RATE_OF_THE_ENTRY):
        return float(rate)
    known = ", ".join(kind.__name__ for kind in (*RATE_OF_THE_STEP, *RATE_OF_THE_ENTRY))
    raise ValueError(
        f"`optimizer` must be one whose rate is known to be that of the step or of each entry ({known}), got "
        f"{kind.__name__}; set `gamma` by hand."
    )
