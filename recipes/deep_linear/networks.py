"""Deep linear networks W_L ... W_1 in float64: their starts, their compression, gradient descent (Qu 2023)."""

import math
import time
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm


Weights = list[Tensor]  # W_1 first
STARTS = ("orthogonal", "normal", "uniform")


def start(widths: list[int], kind: str, eps: float, generator: torch.Generator) -> Weights:
    """W_l(0) of [widths[l], widths[l - 1]].

    "orthogonal": W^T W = eps^2 I or W W^T = eps^2 I, a square orthogonal matrix cut to shape. "normal" and "uniform":
    independent entries with the same Frobenius norm in expectation, eps sqrt(min(m, n)).

    Raises:
        ValueError: if there is no start of that kind.
    """
    if kind not in STARTS:
        raise ValueError(f"`start` must be one of {', '.join(STARTS)}, got {kind!r}.")
    weights = []
    for n, m in pairwise(widths):
        if kind == "orthogonal":
            square = torch.randn(max(m, n), max(m, n), generator=generator, dtype=torch.float64)
            Q, R = torch.linalg.qr(square)
            weights.append(eps * (Q * R.diagonal().sign())[:m, :n].contiguous())  # the signs make it uniform
            continue
        sd = eps * math.sqrt(min(m, n) / (m * n))
        draw = torch.randn if kind == "normal" else torch.rand
        entries = draw(m, n, generator=generator, dtype=torch.float64)
        weights.append(sd * (entries if kind == "normal" else math.sqrt(12) * (entries - 0.5)))
    return weights


def product(weights: Weights) -> Tensor:
    """W_L ... W_1, from the narrow end."""
    if len(weights[-1]) < weights[0].shape[1]:
        return product([w.mT for w in reversed(weights)]).mT
    total = weights[0]
    for weight in weights[1:]:
        total = weight @ total
    return total


def compressed(weights: Weights, target: Tensor, r: int, eps: float) -> Weights:
    """V_{1,1}^T, L inner matrices eps I of [2r, 2r], and U_{L,1}: the network inside its invariant subspace.

    V_{1,1} spans the top r right singular vectors of R and of R^T W_{L:1}(0), R the (seen) target, which is all that
    the first gradient holds; U_{L,1} = W_{L:1}(0) V_{1,1} / eps^L. Where the target has rank r and is all seen,
    gradient descent on the inner ones is that on all, but for rho^L on the complement (Yaras et al. 2023).
    """
    whole, L = product(weights), len(weights)
    V = torch.cat([torch.linalg.svd(R).Vh[:r].mT for R in (target, target.mT @ whole)], 1)
    V = torch.linalg.qr(V).Q
    U = whole @ V / eps**L
    return [V.mT.contiguous(), *(eps * torch.eye(2 * r).to(V) for _ in range(L)), U.contiguous()]


class Descent(NamedTuple):
    iterations: int  # made
    seconds: float  # of a core; of the clock on a GPU; without what `watch` does
    loss: float


def descend(
    weights: Weights,
    loss: Callable[[Weights], Tensor],
    lr: float,
    iterations: int,
    every: int = 1,
    watch: Callable[[int, float, float], None] = lambda step, seconds, loss: None,
    rates: list[float] | None = None,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    tolerance: float = 0.0,
    name: str = "",
) -> Descent:
    """Gradient descent in place, W_l <- (1 - eta lambda) W_l - eta grad_l, with momentum as in torch.optim.SGD.

    Args:
        every: Iterations between two calls of `watch(step, seconds, loss)`, which sees the start and the end too.
        rates: Factors of `lr`, one a weight; 0 leaves it where it is.
        tolerance: Of the loss, looked at where `watch` is called.

    Raises:
        ValueError: if the loss is not finite any more.
    """
    rates = rates or [1.0] * len(weights)
    moving = [w.requires_grad_() for w, rate in zip(weights, rates, strict=True) if rate]
    etas, velocities = [lr * rate for rate in rates if rate], [torch.zeros_like(w) for w in moving]
    clock = time.perf_counter if weights[0].is_cuda else time.process_time
    seconds, step = 0.0, 0
    with tqdm(total=iterations, desc=name, unit="it", mininterval=1) as progress:
        while True:
            with torch.no_grad():
                now = loss(weights).item()
                if not math.isfinite(now):
                    raise ValueError(f"The loss must stay finite, it is {now} at iteration {step}; lower `lr`.")
                watch(step, seconds, now)
            progress.set_postfix(loss=f"{now:.2e}", refresh=False)
            if step >= iterations or now <= tolerance:
                break
            n, begun = min(every, iterations - step), clock()
            for _ in range(n):
                gradients = torch.autograd.grad(loss(weights), moving)
                with torch.no_grad():  # by hand: an optimiser would take longer than these small products
                    for w, gradient, velocity, eta in zip(moving, gradients, velocities, etas, strict=True):
                        gradient = gradient.add(w, alpha=weight_decay) if weight_decay else gradient
                        gradient = velocity.mul_(momentum).add_(gradient) if momentum else gradient
                        w.sub_(gradient, alpha=eta)
            if weights[0].is_cuda:
                torch.cuda.synchronize()
            seconds, step = seconds + clock() - begun, step + n
            progress.update(n)
    for w in weights:
        w.requires_grad_(False)
    return Descent(step, seconds, now)
