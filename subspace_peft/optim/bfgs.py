"""One step of BFGS on one vector, from a state of tensors and numbers: equations (13) and (14) of Li et al. 2021.

Where the paper leaves a choice, or its published code (github.com/nblt/DLDR) does something else, this one does:

    y             gradients of the same batch at both ends of the step; the paper's, of two batches, by name
    no step       after the last trial theta_d stays and B is I again; the published code takes the step all the same
    curvature     an update is left out unless y^T s > eps |y| |s|, eps that of the dtype: of no scale, as 1e-20 is
    lost          where -B g is no direction of descent, or not finite, B is I again
    rounding      (14) holds if it holds up to the last digit of the loss, or no step would be found near a minimum
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from .closure import Objective
from .search import Step


Search = Callable[[Callable[[float], float], float, float], Step | None]


def updated(B: Tensor, s: Tensor, y: Tensor) -> Tensor | None:
    """B of equation (13), with V = I - rho y s^T and rho = 1 / y^T s multiplied out to rank-two terms, in O(d^2):

        V^T B V + rho s s^T = B - rho (s (B y)^T + (B y) s^T) + rho (1 + rho y^T B y) s s^T.

    None if the curvature y^T s is not positive, on the scale of y and s. A symmetric B stays symmetric to the bit.
    """
    curvature = y @ s
    if not curvature > torch.finfo(s.dtype).eps * y.norm() * s.norm():
        return None
    rho = 1 / curvature
    By = B @ y
    cross = torch.outer(s, By)
    new = B - rho * (cross + cross.T) + rho * (1 + rho * (y @ By)) * torch.outer(s, s)
    return new if new.isfinite().all() else None


def _reset(state: dict, theta_d: Tensor) -> None:
    state["B"] = torch.eye(theta_d.numel(), dtype=theta_d.dtype, device=theta_d.device)
    state["updates"] = 0
    state.pop("s", None)
    state.pop("gradient", None)


def _update(state: dict, s: Tensor, y: Tensor) -> None:
    B = updated(state["B"], s, y)
    if B is not None:
        state["B"], state["updates"] = B, state["updates"] + 1


def _direction(state: dict, theta_d: Tensor, gradient: Tensor) -> tuple[Tensor, float]:
    """q = -B g and g^T q, which is negative, or zero where the gradient is."""
    q = -(state["B"] @ gradient)
    slope = (gradient @ q).item()
    if not -float("inf") < slope < 0:
        state["resets"] += state["updates"] > 0
        _reset(state, theta_d)
        q = -gradient
        slope = (gradient @ q).item()
    if not -float("inf") < slope <= 0:
        raise FloatingPointError(
            "The gradient must be finite where a step starts, and is not; theta_d is as it was. Go back to a "
            "checkpoint, or look at the batch."
        )
    return q, slope


def quasi_newton_step(
    theta_d: Tensor, state: dict, loss: Tensor, objective: Objective, closure: Callable, search: Search, group: dict
) -> None:
    """Move theta_d from where the closure left its gradient, and update B."""
    if not state:
        _reset(state, theta_d)
        state.update(step=0, resets=0, stuck=0)
    gradient = theta_d.grad.clone()
    if "s" in state:
        _update(state, state.pop("s"), gradient - state.pop("gradient"))
    q, slope = _direction(state, theta_d, gradient)
    start = theta_d.clone()
    same_batch, lr = group["curvature"] == "same_batch", group["lr"]
    trials, at = 0, None  # where the gradient of theta_d is that of a trial

    def evaluate(alpha: float) -> float:
        nonlocal trials, at
        trials += 1
        theta_d.copy_(start.add(q, alpha=lr * alpha))
        found, has_gradient = objective(closure, gradient=same_batch and trials == 1)
        at = alpha if has_gradient else None
        return found.item()

    try:
        last_digit = torch.finfo(loss.dtype).eps * abs(loss.item())
        found = search(evaluate, loss.item() + last_digit, lr * slope) if slope else None
        theta_d.copy_(start if found is None else start.add(q, alpha=lr * found.alpha))
        if found is not None and same_batch and at != found.alpha:
            objective(closure, gradient=True)
    except BaseException:
        theta_d.copy_(start)
        raise
    state.update(step=state["step"] + 1, alpha=0.0 if found is None else found.alpha, trials=trials)
    if found is not None:
        state["stuck"] = 0
        _learn(state, theta_d - start, gradient, theta_d.grad if same_batch else None)
    elif slope:
        _no_step(state, theta_d, trials)


def _learn(state: dict, s: Tensor, gradient: Tensor, new_gradient: Tensor | None) -> None:
    if new_gradient is None:
        state.update(s=s, gradient=gradient)
    else:
        _update(state, s, new_gradient - gradient)


def _no_step(state: dict, theta_d: Tensor, trials: int) -> None:
    if state["updates"]:
        state["resets"] += 1
    else:
        state["stuck"] += 1
        if state["stuck"] == 1:
            warnings.warn(
                f"No step along the negative gradient lowered the loss enough in {trials} trials; theta_d stays. The "
                "loss may be NaN around it, or not a function of it alone (dropout: see "
                "subspace_peft.optim.repeatable), or too steep: raise `max_trials`.",
                stacklevel=2,
            )
    _reset(state, theta_d)
