"""One step of BFGS on one vector, with its state in a dictionary: equations (13) and (14) of Li et al. 2021.

This code differs from the published one (github.com/nblt/DLDR), and decides what the paper leaves open, as follows:

    y             the difference of two gradients of the same batch; with curvature="next_batch" of two batches, as in
                  the paper
    no step       if the last trial fails, theta_d stays and B is reset to I; the published code takes that step
    curvature     B is only updated if y^T s > eps |y| |s|, with the eps of the dtype, a bound without a scale; the
                  published code compares with 1e-20
    descent       if -B g is not finite or no descent direction, B is reset to I
    rounding      (14) may be missed by the last digit of the loss; otherwise no step would be found near a minimum
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from .closure import Objective
from .line_search import LineSearch


def updated(B: Tensor, s: Tensor, y: Tensor) -> Tensor | None:
    """B of equation (13), with V = I - rho y s^T and rho = 1 / y^T s multiplied out to rank-two terms, in O(d^2):

        V^T B V + rho s s^T = B - rho (s (B y)^T + (B y) s^T) + rho (1 + rho y^T B y) s s^T.

    None if the curvature y^T s is not positive relative to |y| |s|. A symmetric B stays symmetric to the bit.
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
    """q = -B g and g^T q, which is negative, or zero if g is."""
    q = -(state["B"] @ gradient)
    slope = (gradient @ q).item()
    if not -float("inf") < slope < 0:
        state["resets"] += state["updates"] > 0
        _reset(state, theta_d)
        q = -gradient
        slope = (gradient @ q).item()
    if not -float("inf") < slope <= 0:
        raise FloatingPointError(
            "The gradient must be finite where a step starts, and it is not; theta_d is unchanged. Go back to a "
            "checkpoint, or look at the batch."
        )
    return q, slope


def quasi_newton_step(
    theta_d: Tensor,
    state: dict,
    loss: Tensor,
    objective: Objective,
    closure: Callable,
    search: LineSearch,
    group: dict,
) -> None:
    """Move theta_d, at which the closure has just left loss and gradient, and update B."""
    if not state:
        _reset(state, theta_d)
        state.update(step=0, resets=0, stuck=0)
    gradient = theta_d.grad.clone()
    if "s" in state:
        _update(state, state.pop("s"), gradient - state.pop("gradient"))
    q, slope = _direction(state, theta_d, gradient)
    start = theta_d.clone()
    same_batch, lr = group["curvature"] == "same_batch", group["lr"]
    trials, gradient_at = 0, None  # the alpha to which the gradient of theta_d belongs

    def evaluate(alpha: float) -> float:
        nonlocal trials, gradient_at
        trials += 1
        theta_d.copy_(start.add(q, alpha=lr * alpha))
        trial_loss, has_gradient = objective(closure, gradient=same_batch and trials == 1)
        gradient_at = alpha if has_gradient else None
        return trial_loss.item()

    try:
        last_digit = torch.finfo(loss.dtype).eps * abs(loss.item())
        step = search(evaluate, loss.item() + last_digit, lr * slope) if slope else None
        theta_d.copy_(start if step is None else start.add(q, alpha=lr * step.alpha))
        if step is not None and same_batch and gradient_at != step.alpha:
            objective(closure, gradient=True)
    except BaseException:
        theta_d.copy_(start)
        raise
    state.update(step=state["step"] + 1, alpha=0.0 if step is None else step.alpha, trials=trials)
    if step is not None:
        state["stuck"] = 0
        _learn(state, theta_d - start, gradient, theta_d.grad if same_batch else None)
    elif slope:
        _no_step(state, theta_d, trials)


def _learn(state: dict, s: Tensor, gradient: Tensor, new_gradient: Tensor | None) -> None:
    """Update B by this step, or store what the next step, which brings the new gradient, needs to do so."""
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
                f"No step along the negative gradient lowered the loss enough in {trials} trials; theta_d is "
                "unchanged. The loss may be NaN nearby, or depend on more than theta_d (dropout: see "
                "subspace_peft.optim.repeatable), or be too steep: raise `max_trials`.",
                stacklevel=2,
            )
    _reset(state, theta_d)
