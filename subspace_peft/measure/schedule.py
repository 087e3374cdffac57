"""Which run a search makes next, and when it ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .curve import Curve
from .search_file import Proposal, Run


class Outlook(NamedTuple):
    """What a set of runs says about d_p; d_max + 1 stands for everything above d_max."""

    d: int
    low: int
    high: int
    next: int  # the d of the next run
    reason: str  # why the search ends; empty while it goes on


@dataclass(frozen=True)
class Schedule:
    """The next run and the end of a search: functions of its runs, whatever the order in which they ended."""

    curve: Curve
    seeds: int
    confidence: float
    resolution: float
    max_runs: int

    def propose(self, runs: list[Run], under_way: Collection[Proposal]) -> int | None:
        """The d of a run to make beside those under way, which are given the outcomes that are likeliest by the runs.

        None: the search has ended, or would end with these outcomes, so that the real ones have to be awaited.
        """
        outlook = self.look(runs)
        if under_way and not outlook.reason:
            doubling = not any(run.success or run.d == self.curve.d_max for run in runs)
            if doubling and any(proposal.d == self.curve.d_max for proposal in under_way):
                return None  # every doubling has been proposed
            outlook = self.look([*runs, *self._likeliest(runs, under_way, doubling)])
        return None if outlook.reason else outlook.next

    def _likeliest(self, runs: list[Run], under_way: Collection[Proposal], doubling: bool) -> list[Run]:
        """The runs under way with their likeliest outcomes; until one run succeeds all fail, so that d is doubled."""
        chances = np.zeros(len(under_way))
        if not doubling:
            chances = self.curve.chances(*_columns(runs), [proposal.d for proposal in under_way])
        return [
            Run(*proposal, math.nan, chance >= 0.5, 0.0) for proposal, chance in zip(under_way, chances, strict=True)
        ]

    def look(self, runs: list[Run]) -> Outlook:
        d, success = _columns(sorted(runs, key=lambda run: run.seed))
        share, d_max, above = (1 - self.confidence) / 2, self.curve.d_max, self.curve.d_max + 1
        quantiles = self.curve.quantiles(d, success, [share, 0.5, 1 - share])
        low, middle, high = (min(max(_ceil(x), self.curve.d_min), above) for x in quantiles)
        answer = self._step(middle, math.ceil) if success.any() and middle < above else above
        narrow = high <= low * (1 + self.resolution) ** 2
        lacking = self.seeds - int(np.sum(d == min(answer, d_max)))
        doubled = np.flatnonzero(success | (d == d_max))  # the first of these ended the doubling
        if not len(doubled):
            following = min(2 * int(d.max()), d_max) if len(d) else self.curve.d_min
        elif narrow or self.max_runs - len(runs) <= lacking:
            following = min(answer, d_max)
        else:  # a failure at `low`, or a success just below `high`, takes that end off the interval
            turns = min(answer, d_max), self._step(low, math.ceil), self._step(high - 1, math.floor)
            following = turns[(len(runs) - 1 - doubled[0]) % 3]
        settled = bool(len(doubled)) and narrow and lacking <= 0
        reason = self._reason(len(runs), settled, has_end=low == above or high < above)
        return Outlook(answer, low, max(high, answer), following, reason)

    def _reason(self, runs: int, settled: bool, has_end: bool) -> str:
        within = f"within ± {100 * self.resolution:.3g} %"
        if settled:
            return (
                f"the interval is {within}" if has_end else "the interval reaches above `d_max`, and has no end there"
            )
        if runs < self.max_runs:
            return ""
        return (
            f"the search ended at `max_runs` = {self.max_runs}, before the interval was {within} with {self.seeds} "
            "runs at d; raise `max_runs` or `resolution`"
        )

    def _step(self, d: float, rounding: Callable[[float], int]) -> int:
        """The d of the grid next to d; its steps are at most half the resolution, and a whole number doubles d."""
        d_min, d_max = self.curve.d_min, self.curve.d_max
        steps = math.ceil(2 * math.log(2) / math.log1p(self.curve.resolution))
        at = rounding(round(steps * math.log2(max(d, d_min) / d_min), 9))
        return min(round(d_min * 2 ** (at / steps)), d_max)


def _columns(runs: list[Run]) -> tuple[np.ndarray, np.ndarray]:
    """d and success, each [runs]."""
    return np.array([run.d for run in runs], int), np.array([run.success for run in runs], bool)


def _ceil(d: float) -> int:
    return math.ceil(d * (1 - 1e-12))
