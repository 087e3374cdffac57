"""How often a run reaches a threshold, by d."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pandas as pd

from .table import check_number, check_share, numbers, subspace_runs


def success_probability(
    runs: pd.DataFrame,
    threshold: float,
    metric: str = "final_accuracy",
    confidence: float = 0.95,
    larger_is_better: bool = True,
) -> pd.DataFrame:
    """P_s(d, ε, t): the share of runs that reach the threshold (Larsen et al. 2021, eq. 2.3), with Wilson's interval.

    A run that gave no finite number counts as a failure, and is counted in the column `nan`.

    Args:
        runs: One row for each d and seed, with the metric and any further columns. Rows of full training (projection
            "full") are left out.

    Returns:
        Indexed by d, sorted: runs, successes, probability, low, high, nan.

    Raises:
        ValueError: if there are no runs, a column is missing, a run occurs twice, or the runs differ in dataset,
            model, D, projection, normalization or burn_in.
    """
    threshold, confidence = check_number("threshold", threshold), check_share("confidence", confidence)
    runs = subspace_runs(runs, metric)
    values = numbers(runs[metric])
    marked = pd.DataFrame(
        {"d": runs.d.to_numpy(), "success": reached(values, threshold, larger_is_better), "nan": np.isnan(values)}
    )
    table = marked.groupby("d").agg(runs=("success", "size"), successes=("success", "sum"), nan=("nan", "sum"))
    low, high = wilson(table.successes.to_numpy(), table.runs.to_numpy(), confidence)
    table = table.assign(probability=table.successes / table.runs, low=low, high=high)
    return table[["runs", "successes", "probability", "low", "high", "nan"]]


def reached(metric: np.ndarray | float, threshold: float, larger_is_better: bool) -> np.ndarray | bool:
    """Whether a metric is at least as good as the threshold; NaN is not."""
    return metric >= threshold if larger_is_better else metric <= threshold


def wilson(successes: np.ndarray, n: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and the largest p with |k/n - p| <= z sqrt(p (1 - p) / n), for k of n (Wilson 1927)."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre = (successes + z**2 / 2) / (n + z**2)
    half = z * np.sqrt(successes * (n - successes) / n + z**2 / 4) / (n + z**2)
    return np.maximum(centre - half, 0.0), np.minimum(centre + half, 1.0)
