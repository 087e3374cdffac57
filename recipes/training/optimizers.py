"""Optimisers by name, their learning rates over time, and one update by any of them."""

import math
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from subspace_peft.adapter.full_space import full_space
from subspace_peft.optim import PBFGS, ClassGradientNewton, PPlusBFGS, repeatable


class Choices(Protocol):
    """What the settings of a run say of its optimiser."""

    optimizer: str
    lr: float
    momentum: float
    weight_decay: float
    schedule: str
    decay_epoch: int
    epochs: int


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _descent(kind: type[Optimizer], model: nn.Module, settings: Choices) -> Optimizer:
    momentum = {"momentum": settings.momentum} if settings.momentum else {}
    return kind(_trainable(model), lr=settings.lr, weight_decay=settings.weight_decay, **momentum)


def _pbfgs(model: nn.Module, settings: Choices, curvature: str = "same_batch") -> Optimizer:
    return PBFGS(_trainable(model), curvature=curvature)


def _pplusbfgs(model: nn.Module, settings: Choices, curvature: str = "same_batch") -> Optimizer:
    theta_d = _trainable(model)
    return PPlusBFGS(theta_d, *full_space(model), curvature=curvature)


def _class_gradient(model: nn.Module, settings: Choices, **choices) -> Optimizer:
    return ClassGradientNewton(_trainable(model), lr=settings.lr, **choices)


class LarsenAdam(Optimizer):
    """Adam as the code of Larsen et al. 2021 has it, without a step count in its bias correction:

        step = lr m / (1 - beta_1) / (sqrt(v / (1 - beta_2)) + eps)

    which is Adam's step times 1.0 at first, 2.08 at step 12, 1.02 at 100, 0.52 at 469 and 0.32 in the limit.
    """

    def __init__(self, params, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-7):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            beta_1, beta_2 = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state.update(m=torch.zeros_like(p), v=torch.zeros_like(p))
                m, v = state["m"], state["v"]
                m.lerp_(p.grad, 1 - beta_1)
                v.lerp_(p.grad.square(), 1 - beta_2)
                scale = (v / (1 - beta_2)).sqrt_().add_(group["eps"])
                p.addcdiv_(m, scale, value=-group["lr"] / (1 - beta_1))


def _larsen_adam(model: nn.Module, settings: Choices) -> Optimizer:
    return LarsenAdam(_trainable(model), lr=settings.lr)


OPTIMIZERS: dict[str, Callable[[nn.Module, Choices], Optimizer]] = {
    "sgd": partial(_descent, torch.optim.SGD),
    "adam": partial(_descent, torch.optim.Adam),
    "adamw": partial(_descent, torch.optim.AdamW),
    "adam_larsen": _larsen_adam,
    "pbfgs": _pbfgs,
    "pbfgs_paper": partial(_pbfgs, curvature="next_batch"),
    "pplusbfgs": _pplusbfgs,
    "pplusbfgs_paper": partial(_pplusbfgs, curvature="next_batch"),
    "class_gradient_all": _class_gradient,
    "class_gradient": partial(_class_gradient, examples="own"),
    "class_gradient_poster": partial(_class_gradient, examples="own", gram=False),
}

SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "constant": lambda t, decay: 1.0,
    "cosine": lambda t, decay: 0.5 + 0.5 * math.cos(math.pi * t),
    "step": lambda t, decay: 1.0 if t < decay else 0.1,
    "staircase": lambda t, decay: (1.0, 0.3, 0.1, 0.03, 0.03)[int(4 * t)],
}
"""The factor on the learning rate after a share t of all steps; `decay` is the share after which "step" falls."""


def scheduled(optimizer: Optimizer, settings: Choices, steps: int) -> LambdaLR:
    factor, decay = SCHEDULES[settings.schedule], settings.decay_epoch / settings.epochs
    return LambdaLR(optimizer, lambda step: factor(step / steps, decay))


def update(model: nn.Module, optimizer: Optimizer, accelerator: Accelerator, images: Tensor, labels: Tensor) -> Tensor:
    """One step on a batch; the loss before it."""
    inner = getattr(optimizer, "optimizer", optimizer)
    losses = []

    def closure() -> Tensor | tuple[Tensor, ...]:
        optimizer.zero_grad()
        logits = model(images)
        loss = cross_entropy(logits, labels)
        losses.append(loss.detach())
        if getattr(inner, "needs_logits", False):
            return loss, logits, labels
        if torch.is_grad_enabled():
            accelerator.backward(loss)
        return loss

    if getattr(inner, "needs_closure", False):
        optimizer.step(repeatable(closure, model))
    else:
        closure()
        optimizer.step()
    return losses[0]
