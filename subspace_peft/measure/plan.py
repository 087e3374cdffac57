"""Which run a search makes next, and when it ends."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .curve import Curve
from .search_file import Run


class State(NamedTuple):
    """What is known after some runs; d_max + 1 stands for all that is above d_max."""

    d: int
    low: int
    high: int
    next: int  # the d of the run to make
    reason: str  # why none is to be made; empty: one is


@dataclass(frozen=True)
class Plan:
    """Which run to make after those that there are, and when to end: a function of those runs alone."""

    curve: Curve
    seeds: int
    confidence: float
    resolution: float
    max_runs: int

    def look(self, runs: list[Run]) -> State:
        d, success = np.array([run.d for run in runs], int), np.array([run.success for run in runs], bool)
        share, d_max, above = (1 - self.confidence) / 2, self.curve.d_max, self.curve.d_max + 1
        quantiles = self.curve.quantiles(d, success, [share, 0.5, 1 - share])
        low, middle, high = (min(max(_ceil(x), self.curve.d_min), above) for x in quantiles)
        answer = self._step(middle, math.ceil) if success.any() and middle < above else above
        narrow = high <= low * (1 + self.resolution) ** 2
        lacking = self.seeds - int(np.sum(d == min(answer, d_max)))
        doubled = np.flatnonzero(success | (d == d_max))  # the first of these ended the doubling
        if not len(doubled):
            following = min(2 * int(d[-1]), d_max) if len(d) else self.curve.d_min
        elif narrow or self.max_runs - len(runs) <= lacking:
            following = min(answer, d_max)
        else:  # a failure at `low` takes it off the interval, a success just below `high` takes that off
            turns = min(answer, d_max), self._step(low, math.ceil), self._step(high - 1, math.floor)
            following = turns[(len(runs) - 1 - doubled[0]) % 3]
        reason = self._reason(len(runs), len(doubled) and narrow and lacking <= 0)
        return State(answer, low, max(high, answer), following, reason)

    def _reason(self, runs: int, found: bool) -> str:
        within = f"within ± {100 * self.resolution:.3g} %"
        if found:
            return f"the interval is {within}"
        if runs < self.max_runs:
            return ""
        return (
            f"`max_runs` = {self.max_runs} ended it before the interval was {within} and {self.seeds} runs were at d: "
            "raise it to go on, or `resolution`"
        )

    def _step(self, d: float, rounding: Callable[[float], int]) -> int:
        """A d of the grid near d; its steps are half the resolution, and a whole number of them doubles d."""
        d_min, d_max = self.curve.d_min, self.curve.d_max
        steps = math.ceil(2 * math.log(2) / math.log1p(self.curve.resolution))
        at = rounding(round(steps * math.log2(max(d, d_min) / d_min), 9))
        return min(round(d_min * 2 ** (at / steps)), d_max)


def _ceil(d: float) -> int:
    return math.ceil(d * (1 - 1e-12))
