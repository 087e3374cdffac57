"""find_dimension: a search for the smallest sufficient d, by runs where they say most."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from tqdm.auto import tqdm

from .curve import Curve
from .schedule import Schedule
from .table import check_integer, check_number, check_share
from .trials import Trials
from .workers import Workers


class Cost(NamedTuple):
    runs: int
    d: int  # the sum over runs
    seconds: float  # the sum over runs


@dataclass(frozen=True, eq=False)
class SearchResult:
    """The outcome of a search, and its runs."""

    d: int | None  # None: above d_max, or no run reached the threshold
    interval: tuple[int | None, int | None]  # of d; None: above d_max
    runs: pd.DataFrame  # d, seed, metric, success, seconds; by seed, the order in which they were proposed
    cost: Cost
    threshold: float
    probability: float
    confidence: float
    d_min: int
    d_max: int
    best: tuple[float, int] | None  # the best metric of all runs, and its d; None where no run gave a number
    reason: str  # why the search ended, in words

    def __str__(self) -> str:
        low, high = (f"above {self.d_max}" if end is None else str(end) for end in self.interval)
        d = f"d = {self.d}" if self.d else f"no d up to {self.runs.d.max()}"
        best = f"best seen {self.best[0]:.6g} at d = {self.best[1]}" if self.best else "no run gave a number"
        nan = int(self.runs.metric.isna().sum())
        return (
            f"{d} ({100 * self.confidence:.3g} % interval: {low if low == high else f'{low} to {high}'}) reaches "
            f"{self.threshold:.6g} with probability {self.probability:.3g}; {best}; {self.cost.runs} runs, sum of d "
            f"{self.cost.d}, {self.cost.seconds:.1f} s; {self.reason}"
            + ("; no d below `d_min` was tried" if self.interval[0] == self.d_min > 1 else "")
            + (f"; {nan} runs gave no number and count as failures" if nan else "")
        )


def find_dimension(
    train: Callable[[int, int], float],
    threshold: float,
    d_max: int,
    d_min: int = 1,
    seeds: int = 5,
    probability: float = 0.5,
    confidence: float = 0.95,
    resolution: float = 0.1,
    max_runs: int = 60,
    file: str | os.PathLike | None = None,
    progress: bool = True,
    larger_is_better: bool = True,
    executor: Executor | None = None,
    workers: int | None = None,
) -> SearchResult:
    """Search d_p, the smallest d at which a run reaches the threshold with probability p.

    p = 1/2 is the median run, p = 1 - δ is d*(ε, t, δ) of Larsen et al. 2021, definition 2.1. d is doubled from
    `d_min` until a run succeeds; further runs go in turn to the middle, the low end and the high end of the interval
    of d_p by the runs so far (`Curve`), on a grid whose steps are half the resolution. The result is the first d of
    the grid above the median of d_p, with the central interval; both depend on the set of runs, not on their order.

    Args:
        train: Function of d and a seed that returns the metric of that run. Seeds are 0, 1, 2 ..., a new one for each
            run, so that runs are independent. A number that is not finite is a failure.
        seeds: The least number of runs at the d that is returned.
        resolution: The search ends when the interval is no wider than from d to d (1 + resolution)^2.
        max_runs: The largest number of runs; the search ends there, however wide the interval is.
        file: JSON lines, for one search at a time and one `train`. A search that was stopped goes on from its file
            and repeats no finished run; one that had ended goes on with a larger `max_runs` or a finer resolution.
        executor: Makes the runs, as many at a time as there are workers. What is proposed takes the runs under way to
            have their likeliest outcomes. None: this process makes them, one after the other.
        workers: How many; None: as many as the executor says it has (pools of processes or threads, dask).

    Raises:
        ValueError: before any run, if an argument is out of range, or the file is of another search or version.
        RunError: if a run raises or returns no number. Runs that had started are awaited and kept.
    """
    schedule = _schedule(d_min, d_max, seeds, probability, confidence, resolution, max_runs)
    threshold, crew = check_number("threshold", threshold), Workers(train, executor, workers)
    search = {"threshold": threshold, "larger_is_better": bool(larger_is_better)}
    search |= {"probability": schedule.curve.probability, "d_min": int(d_min), "d_max": int(d_max)}
    trials = Trials(threshold, larger_is_better, file and Path(file), search, in_turn=crew.number == 1)
    with tqdm(total=max_runs, initial=len(trials.runs), unit="run", disable=not progress) as bar:
        _make_runs(schedule, trials, crew, bar)
        bar.total = len(trials.runs)
    return _result(trials, schedule)


def _schedule(
    d_min: int, d_max: int, seeds: int, probability: float, confidence: float, resolution: float, max_runs: int
) -> Schedule:
    probability, confidence = check_share("probability", probability), check_share("confidence", confidence)
    d_min, d_max = check_integer("d_min", d_min), check_integer("d_max", d_max)
    if check_number("resolution", resolution) < 0:
        raise ValueError(f"`resolution` must be at least 0, got {resolution}; 0.1 is ± 10 %, 0 a single d.")
    if d_max < d_min:
        raise ValueError(f"`d_max` must be at least `d_min` = {d_min}, got {d_max}; raise it.")
    curve = Curve(probability, d_min, d_max, max(resolution, 1 / d_max))
    return Schedule(curve, check_integer("seeds", seeds), confidence, resolution, check_integer("max_runs", max_runs))


def _make_runs(schedule: Schedule, trials: Trials, workers: Workers, bar: tqdm) -> None:
    """Make runs until the schedule asks for none. After a failure start none, await the others, and raise."""
    failure = None
    try:
        while True:
            while failure is None and len(workers.under_way) < workers.number:
                proposal = trials.propose(schedule, workers.under_way)
                if proposal is None:
                    break
                bar.set_description("d = " + ", ".join(str(run.d) for run in [*workers.under_way, proposal]))
                workers.submit(proposal)
            if not workers.under_way:
                break
            for proposal, outcome in workers.wait():
                if not isinstance(outcome, Exception):
                    trials.add(proposal, *outcome)
                    bar.update()
                elif failure is None:
                    failure = proposal, outcome
                    workers.cancel()
                    bar.set_description(f"d = {proposal.d} failed, waiting for the others")
    except BaseException:  # KeyboardInterrupt, or a full disk
        workers.cancel(interrupted=True)
        raise
    if failure:
        raise trials.failed(*failure) from failure[1]


def _result(trials: Trials, schedule: Schedule) -> SearchResult:
    outlook, runs, curve = schedule.look(trials.runs), trials.table(), schedule.curve
    best, numbers = None, runs[runs.metric.notna()]
    if len(numbers):
        row = numbers.loc[numbers.metric.idxmax() if trials.larger_is_better else numbers.metric.idxmin()]
        best = float(row.metric), int(row.d)
    d, low, high = (None if end > curve.d_max else end for end in (outlook.d, outlook.low, outlook.high))
    cost = Cost(len(runs), int(runs.d.sum()), float(runs.seconds.sum()))
    settings = trials.threshold, curve.probability, schedule.confidence, curve.d_min, curve.d_max
    return SearchResult(d, (low, high), runs, cost, *settings, best, outlook.reason)
