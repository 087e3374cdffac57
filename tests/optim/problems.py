"""Objectives that every optimiser is tested on: PROBLEMS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy


def quadratic_matrix(d: int = 6) -> Tensor:
    """Symmetric positive definite, with eigenvalues from 0.5 to 8."""
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    return basis @ torch.diag(torch.linspace(0.5, 8, d, dtype=torch.float64)) @ basis.T


def quadratic(x: Tensor) -> Tensor:
    """1/2 (x - 1)^T A (x - 1)."""
    return 0.5 * (x - 1) @ quadratic_matrix().to(x) @ (x - 1)


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.from_numpy(images).float() / 16, torch.from_numpy(labels)


IMAGES, LABELS = digits()


def network(x: Tensor, images: Tensor = IMAGES[:300]) -> Tensor:
    """The logits of a network 64-4-10 whose 310 weights are P x, P fixed."""
    generator = torch.Generator().manual_seed(1)
    P = torch.randn(64 * 4 + 4 + 4 * 10 + 10, len(x), generator=generator).to(x) / len(x) ** 0.5
    first, bias, last, end = (P @ x + P[:, 0]).split([256, 4, 40, 10])
    return torch.tanh(images.to(x) @ first.view(64, 4) + bias) @ last.view(4, 10) + end


@dataclass(frozen=True)
class Problem:
    name: str
    start: Callable[[], Tensor]
    loss: Callable[[Tensor], Tensor]
    logits: Callable[[Tensor], Tensor] | None = None

    def parameter(self, dtype: torch.dtype = torch.float64) -> torch.nn.Parameter:
        return torch.nn.Parameter(self.start().to(dtype))

    def closure(self, optimizer: torch.optim.Optimizer, point: Callable[[], Tensor]) -> Callable:
        """The closure that `optimizer` needs, at `point`."""
        if getattr(optimizer, "needs_logits", False):
            return lambda: (self.loss(point()), self.logits(point()), LABELS[:300])

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(point())
            if torch.is_grad_enabled():
                loss.backward()
            return loss

        return closure

    def __repr__(self) -> str:
        return self.name


PROBLEMS = {
    "quadratic": Problem("quadratic", lambda: torch.zeros(6), quadratic),
    "rosenbrock": Problem("rosenbrock", lambda: torch.tensor([-1.2, 1.0]), rosenbrock),
    "network": Problem("network", lambda: torch.zeros(30), lambda x: cross_entropy(network(x), LABELS[:300]), network),
}


def vector(*numbers: float, dtype=torch.float64) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(numbers, dtype=dtype))


class Closure:
    """A closure that records whether each of its evaluations had gradients."""

    def __init__(self, x, loss, always_backward: bool = False):
        self.x, self.loss, self.always_backward = x, loss, always_backward
        self.calls: list[str] = []

    def __call__(self):
        self.calls.append("gradient" if torch.is_grad_enabled() else "forward")
        self.x.grad = None
        loss = self.loss(self.x)
        if torch.is_grad_enabled() or self.always_backward:
            loss.backward()
        return loss
