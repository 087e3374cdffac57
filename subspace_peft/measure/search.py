"""find_dimension: the smallest d that suffices, looked for by runs that are made where they say most."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from tqdm.auto import tqdm

from .curve import Curve
from .plan import Plan, State
from .probability import reached
from .search_file import Run, append, open_file
from .table import check_integer, check_number, check_share


class RunError(RuntimeError):
    """A run of a search raised, or returned no number."""

    def __init__(self, message: str, d: int, seed: int, runs: pd.DataFrame):
        super().__init__(message)
        self.d, self.seed = d, seed
        self.runs = runs  # those before it, as in the result


class Cost(NamedTuple):
    runs: int
    d: int  # the sum over runs
    seconds: float


@dataclass(frozen=True, eq=False)
class Search:
    """What a search found, and the runs it made."""

    d: int | None  # None: above d_max, or no run reached the threshold
    interval: tuple[int | None, int | None]  # of d; None: above d_max
    runs: pd.DataFrame  # d, seed, metric, success, seconds, in the order in which they were made
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
) -> Search:
    """d_p, the smallest d at which a run reaches the threshold with probability p: the median run by default; with
    p = 1 - δ it is d*(ε, t, δ) of Larsen et al. 2021, definition 2.1.

    d is doubled from `d_min` until a run succeeds. From then on runs are made in turn at the middle, the low end and
    the high end of what d_p can still be by the runs so far (`Curve`: Bayes' rule for a curve that rises with ln d),
    on a grid whose steps are half the resolution. The result is the first d of that grid above the median of d_p, and
    the interval the central one of its distribution; docs/measure.md says how often it held the truth.

    Args:
        train: Of d and a seed; returns the metric of that run. Each run has a seed of its own, 0, 1, 2 ..., so that
            runs are independent. A number that is not finite is a failure.
        seeds: At least so many runs are made at the d that is returned.
        resolution: The search ends when the interval is no wider than from d to d (1 + resolution)^2.
        max_runs: The search ends then at the latest, however wide the interval is.
        file: JSON lines, of one process and one `train`: a changed one needs another file. A search that was stopped
            goes on from its file and repeats no run. With more `max_runs` or
            a finer resolution, a search that had ended goes on too.

    Raises:
        ValueError: before any run, if an argument is out of range, or the file is of another search or version.
        RunError: if a run raises, or returns no number.
    """
    plan = Plan(
        Curve(
            check_share("probability", probability),
            d_min=check_integer("d_min", d_min),
            d_max=check_integer("d_max", d_max),
            resolution=max(_check_resolution(resolution), 1 / d_max),
        ),
        check_integer("seeds", seeds),
        check_share("confidence", confidence),
        resolution,
        check_integer("max_runs", max_runs),
    )
    threshold = check_number("threshold", threshold)
    if d_max < d_min:
        raise ValueError(f"`d_max` must be at least `d_min` = {d_min}, got {d_max}; raise it.")
    if not callable(train):
        raise ValueError(f"`train` must be a function of d and seed that returns a metric, got {train!r}.")
    search = {"threshold": threshold, "larger_is_better": bool(larger_is_better), "probability": probability}
    search |= {"d_min": int(d_min), "d_max": int(d_max)}
    trials = Trials(train, threshold, larger_is_better, file and Path(file), search)
    with tqdm(total=max_runs, initial=len(trials.runs), unit="run", disable=not progress) as bar:
        state = plan.look(trials.runs)
        while not state.reason:
            bar.set_description(f"d = {state.next}")
            trials.make(state.next)
            bar.update()
            state = plan.look(trials.runs)
        bar.total = len(trials.runs)
    return _result(trials, plan, state)


class Trials:
    """The runs of a search, in memory and in its file."""

    def __init__(
        self,
        train: Callable[[int, int], float],
        threshold: float,
        larger_is_better: bool,
        file: Path | None,
        search: dict,
    ):
        self.train, self.threshold, self.larger_is_better, self.file = train, threshold, larger_is_better, file
        self.runs = [self._run(**run) for run in open_file(file, search)] if file else []

    def make(self, d: int) -> None:
        seed, start = len(self.runs), time.perf_counter()
        try:
            metric = float(self.train(d, seed))
        except Exception as error:
            raise self._failed(d, seed, error) from error
        run = self._run(d, seed, metric, round(time.perf_counter() - start, 3))
        if self.file:
            append(self.file, run)
        self.runs.append(run)

    def table(self) -> pd.DataFrame:
        return pd.DataFrame(self.runs, columns=Run._fields)

    def _run(self, d: int, seed: int, metric: float, seconds: float) -> Run:
        metric = metric if math.isfinite(metric) else math.nan
        return Run(d, seed, metric, bool(reached(metric, self.threshold, self.larger_is_better)), seconds)

    def _failed(self, d: int, seed: int, error: Exception) -> RunError:
        where = "`runs` of this error; with `file`, the same call could go on"
        if self.file:
            where = f"{str(self.file)!r}, with which the same call goes on"
        kept = f"The {len(self.runs)} runs before it are kept in {where}"
        message = f"The run of d = {d}, seed = {seed} failed: {type(error).__name__}: {error}. {kept}."
        return RunError(message, d, seed, self.table())


def _check_resolution(resolution: float) -> float:
    if check_number("resolution", resolution) < 0:
        raise ValueError(f"`resolution` must be at least 0, got {resolution}; 0.1 is ± 10 %, 0 a single d.")
    return resolution


def _result(trials: Trials, plan: Plan, state: State) -> Search:
    runs, d_max = trials.table(), plan.curve.d_max
    best, numbers = None, runs[runs.metric.notna()]
    if len(numbers):
        row = numbers.loc[numbers.metric.idxmax() if trials.larger_is_better else numbers.metric.idxmin()]
        best = float(row.metric), int(row.d)
    d, low, high = (None if end > d_max else end for end in state[:3])
    cost = Cost(len(runs), int(runs.d.sum()), float(runs.seconds.sum()))
    settings = trials.threshold, plan.curve.probability, plan.confidence, plan.curve.d_min, d_max
    return Search(d, (low, high), runs, cost, *settings, best, state.reason)
