"""Line searches: how far to go along a descent direction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite


@dataclass(frozen=True)
class Step:
    """The result of a line search: the step length, the loss there, and how many step lengths were tried."""

    alpha: float
    loss: float
    trials: int


LineSearch = Callable[[Callable[[float], float], float, float], Step | None]
"""(alpha -> loss, loss at alpha = 0, slope there) -> the step, or None if there is none."""


@dataclass(frozen=True)
class Armijo:
    """Backtracking to the Armijo condition (Li et al. 2021, equation 14): the first alpha of 1, beta, beta^2, ... with

        L(w + alpha q) <= L(w) + c alpha g^T q.

    A trial whose loss is NaN or infinite fails.

    Args:
        c: In (0, 1). The larger it is, the more of the decrease that the slope predicts is required.
        beta: In (0, 1). The published code overwrites the paper's 0.55 with 0.4.
        max_trials: The search stops after so many trials, by default at alpha = 0.55^19 = 1e-5.

    Raises:
        ValueError: if a number is out of its range.
    """

    c: float = 0.4
    beta: float = 0.55
    max_trials: int = 20

    def __post_init__(self):
        for name in ("c", "beta"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be between 0 and 1, got {getattr(self, name)}.")
        if not isinstance(self.max_trials, int) or self.max_trials < 1:
            raise ValueError(f"`max_trials` must be a whole number of at least 1, got {self.max_trials}.")

    def __call__(self, evaluate: Callable[[float], float], loss: float, slope: float) -> Step | None:
        """The step, or None if no trial meets the condition.

        Args:
            evaluate: alpha -> L(w + alpha q).
            loss: L(w).
            slope: g^T q, negative.
        """
        alpha = 1.0
        for trial in range(1, self.max_trials + 1):
            trial_loss = evaluate(alpha)
            if isfinite(trial_loss) and trial_loss <= loss + self.c * alpha * slope:
                return Step(alpha, trial_loss, trial)
            alpha *= self.beta
        return None
