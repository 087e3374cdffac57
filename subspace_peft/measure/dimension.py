"""The smallest sufficient d of a grid: threshold training dimension and intrinsic dimension."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from .probability import reached
from .table import TASK, check_number, check_share, numbers, subspace_runs


METHODS = {
    "first_crossing": "the first d of the grid at which the {} reaches {:.6g}, whatever larger d do",
    "isotonic": "the first d of the grid at which the {}, made monotone in d by least squares, reaches {:.6g}",
}


@dataclass(frozen=True)
class Dimension:
    """The smallest sufficient d of a table, and the rule by which it was found."""

    d: int | None  # None: no d of the grid suffices
    interval: tuple[int | None, int | None] | None  # of d; an end of None lies above the largest d; None: unknown
    confidence: float  # of the interval
    threshold: float  # of the metric
    rule: str  # the condition on d, in words
    best: tuple[float, int] | None  # the best metric of all runs, and its d; None where no run gave a number
    largest: int  # d of the grid
    nan: int  # runs that gave no number

    def __str__(self) -> str:
        best = f"best seen {self.best[0]:.6g} at d = {self.best[1]}" if self.best else "no run gave a number"
        d = f"d = {self.d}" if self.d else f"no d up to {self.largest}"
        if self.interval:
            low, high = (f"above {self.largest}" if end is None else str(end) for end in self.interval)
            span = low if low == high else f"{low} to {high}"
            d += f" ({100 * self.confidence:.3g} % interval: {span})"
        else:
            d += " (no interval: a d around it was run once)"
        nan = f"; {self.nan} runs gave no number and count as the worst" if self.nan else ""
        return f"{d}: {self.rule}; {best}{nan}"


def threshold_dimension(
    runs: pd.DataFrame,
    threshold: float,
    delta: float = 0.1,
    metric: str = "final_accuracy",
    method: str = "first_crossing",
    confidence: float = 0.95,
    larger_is_better: bool = True,
    resamples: int = 2000,
    seed: int = 0,
) -> Dimension:
    """d*(ε, t, δ): the smallest d of the grid with P_s(d, ε, t) >= 1 - δ (Larsen et al. 2021, definition 2.1).

    Args:
        runs: As in `success_probability`.
        method: If P_s falls again at a larger d, "first_crossing" ignores that, as Larsen et al. do; "isotonic" takes
            the monotone curve that is nearest to P_s in weighted least squares.
        resamples: Number of resamples of the bootstrap over the runs of each d, which gives the interval. The
            bootstrap has no doubt about a d whose runs all agree: look at the intervals of `success_probability` too.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: as `success_probability`.
    """
    threshold, delta = check_number("threshold", threshold), check_share("delta", delta)
    grid = _Grid(subspace_runs(runs, metric), metric, larger_is_better)
    success = reached(grid.metric, threshold, larger_is_better).astype(float)
    quantity = f"share of runs with {metric} {'>=' if larger_is_better else '<='} {threshold:.6g}"
    d, interval = grid.crossing(success, 1 - delta, method, confidence, resamples, seed)
    return grid.dimension(d, interval, confidence, threshold, METHODS[method].format(quantity, 1 - delta))


def intrinsic_dimension(
    runs: pd.DataFrame,
    fraction: float | None = None,
    absolute: float | None = None,
    baseline: float | pd.DataFrame | None = None,
    metric: str = "final_accuracy",
    method: str = "first_crossing",
    confidence: float = 0.95,
    larger_is_better: bool = True,
    resamples: int = 2000,
    seed: int = 0,
) -> Dimension:
    """d_int: the smallest d of the grid whose mean metric reaches a threshold (Li et al. 2018: d_int90).

    A run that gave no finite number counts as the worst run of the table.

    Args:
        runs: As in `success_probability`.
        fraction: The threshold as a share of the baseline; 0.9 (d_int90) if neither this nor `absolute` is given.
        absolute: The threshold itself, instead of a share.
        baseline: The metric of full training: a number, or a table of its runs, whose mean is taken. By default the
            rows of `runs` with projection "full".
        metric: "final_accuracy", "best_accuracy" (of the epoch that the test data chose) or another column.
        method, resamples, seed: As in `threshold_dimension`.

    Raises:
        ValueError: as `success_probability`, or if there is no baseline, or it belongs to another task.
    """
    threshold = _threshold(runs, fraction, absolute, baseline, metric, larger_is_better)
    grid = _Grid(subspace_runs(runs, metric), metric, larger_is_better)
    sign = 1 if larger_is_better else -1
    values, missing = sign * grid.metric, np.isnan(grid.metric)
    if not missing.all():
        values = np.where(missing, values[~missing].min(), values)
    d, interval = grid.crossing(values, sign * threshold, method, confidence, resamples, seed)
    return grid.dimension(d, interval, confidence, threshold, METHODS[method].format(f"mean {metric}", threshold))


class _Grid:
    """The runs of a table, by d."""

    def __init__(self, runs: pd.DataFrame, metric: str, larger_is_better: bool):
        self.metric, self.larger_is_better = numbers(runs[metric]), larger_is_better
        self.d = runs.d.to_numpy()
        self.grid, self.runs = np.unique(self.d, return_counts=True)

    def crossing(
        self, values: np.ndarray, level: float, method: str, confidence: float, resamples: int, seed: int
    ) -> tuple[int | None, tuple[int | None, int | None] | None]:
        """The first d at which the mean of the values [runs] reaches the level, and its bootstrap interval."""
        if method not in METHODS:
            raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {method!r}.")
        share = (1 - check_share("confidence", confidence)) / 2
        groups = [values[self.d == d] for d in self.grid]
        generator = np.random.default_rng(seed)
        drawn = [group[generator.integers(0, len(group), (resamples, len(group)))].mean(1) for group in groups]
        means = np.column_stack([[group.mean() for group in groups], drawn])  # [grid, 1 + resamples]
        if method == "isotonic":
            means = isotonic(means, self.runs)
        enough = means >= level - 1e-9 * abs(level)  # 9 of 10 reach 0.9 despite rounding
        at = np.where(enough.any(0), enough.argmax(0), len(self.grid))
        low, high = np.quantile(at[1:], [share, 1 - share], method="inverted_cdf")
        ends = [*map(int, self.grid), None]
        known = (self.runs[max(low - 1, 0) : high + 1] > 1).all()
        return ends[at[0]], (ends[low], ends[high]) if known else None

    def dimension(
        self, d: int | None, interval: tuple | None, confidence: float, threshold: float, rule: str
    ) -> Dimension:
        missing = np.isnan(self.metric)
        best = None
        if not missing.all():
            at = np.nanargmax(self.metric) if self.larger_is_better else np.nanargmin(self.metric)
            best = float(self.metric[at]), int(self.d[at])
        return Dimension(d, interval, confidence, threshold, rule, best, int(self.grid[-1]), int(missing.sum()))


def isotonic(means: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The monotone curve nearest to each column of `means` in weighted least squares.

        max over j <= i of min over k >= i of the mean over j ... k

    Args:
        means: [grid, ...]
        weights: [grid]
    """
    weights = weights.reshape(-1, *[1] * (means.ndim - 1))
    zero = np.zeros_like(means[:1])
    sums = np.concatenate([zero, np.cumsum(weights * means, 0)])
    totals = np.concatenate([[0], np.cumsum(weights)]).reshape(-1, *[1] * (means.ndim - 1))
    fitted = np.full(means.shape, -np.inf)
    for j in range(len(means)):
        averages = (sums[j + 1 :] - sums[j]) / (totals[j + 1 :] - totals[j])  # over j ... k, k = j, j + 1, ...
        fitted[j:] = np.maximum(fitted[j:], np.minimum.accumulate(averages[::-1])[::-1])
    return fitted


def _threshold(
    runs: pd.DataFrame,
    fraction: float | None,
    absolute: float | None,
    baseline: float | pd.DataFrame | None,
    metric: str,
    larger_is_better: bool,
) -> float:
    if absolute is not None:
        if fraction is not None:
            raise ValueError(
                f"Only one of `fraction` and `absolute` may be given, got {fraction} and {absolute}; drop one."
            )
        return check_number("absolute", absolute)
    if not larger_is_better:
        raise ValueError("`fraction` needs a metric of which more is better; give `absolute` for a loss.")
    fraction = check_number("fraction", 0.9 if fraction is None else fraction)
    if not 0 < fraction <= 1:
        raise ValueError(f"`fraction` must be above 0 and at most 1, got {fraction}; 0.9 is 90 % of full training.")
    baseline = _baseline(runs, baseline, metric)
    if not baseline > 0:
        raise ValueError(
            f"`fraction` needs a metric of full training above 0, of which a share is less, got {baseline}; give "
            "`absolute`."
        )
    return fraction * baseline


def _baseline(runs: pd.DataFrame, baseline: float | pd.DataFrame | None, metric: str) -> float:
    if baseline is None:
        if "projection" not in runs or not (runs.projection == "full").any():
            raise ValueError(
                "`fraction` needs the metric of full training, and the table has no rows with projection 'full'; give "
                "`baseline`, a number or a table of such runs, or `absolute`."
            )
        baseline = runs[runs.projection == "full"]
    if not isinstance(baseline, pd.DataFrame):
        return check_number("baseline", baseline)
    if metric not in baseline or not len(baseline):
        raise ValueError(f"`baseline` must have rows and a column `{metric}`, got {list(baseline.columns)}.")
    for column in TASK:
        if column in runs and column in baseline:
            values = pd.concat([runs[column], baseline[column]]).dropna().drop_duplicates().tolist()
            if len(values) > 1:
                raise ValueError(
                    f"Full training and runs in a subspace must be of one `{column}`, got "
                    f"{', '.join(map(repr, values))}; take the runs of one."
                )
    missing = int(np.isnan(numbers(baseline[metric])).sum())
    if missing:
        raise ValueError(
            f"Full training must have given a number in every run, {missing} of {len(baseline)} gave none; give "
            "`baseline`, a number or the table of the runs that count."
        )
    return check_number("baseline", baseline[metric].mean())
