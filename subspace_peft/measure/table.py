"""Tables of runs, with d, seed and a metric in each row, and the checks that they pass before they are measured."""

from __future__ import annotations

import math
from numbers import Integral, Real

import numpy as np
import pandas as pd


TASK = ("dataset", "model")
"""Columns in which full training and training in a subspace must agree."""
SETTINGS = (*TASK, "D", "projection", "normalization", "burn_in")
"""Columns that say what was run; runs that differ in one of them lie on different curves over d."""


def subspace_runs(runs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The runs in a subspace, sorted by d, without those of full training (projection "full").

    Raises:
        ValueError: if there are none, a column is missing, their settings differ, a d is not a positive integer, or a
            run occurs twice.
    """
    runs = checked(runs, metric)
    for column in SETTINGS:
        values = runs[column].dropna().drop_duplicates().tolist() if column in runs else []
        if len(values) > 1:
            raise ValueError(
                f"A table must hold runs of one `{column}`, got {', '.join(map(repr, values))}; take those of one, "
                f"such as runs[runs.{column} == {values[0]!r}]."
            )
    _check_repeated(runs, ["d", "seed"])
    return runs.sort_values(["d", "seed"])


def checked(runs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The runs in a subspace, of any settings, in the order of the table, with d as an integer."""
    if not len(runs):
        raise ValueError("A table must hold runs, got an empty one; check that they have results.")
    for column in ("d", "seed", metric):
        if column not in runs:
            raise ValueError(
                f"A table of runs must have a column `{column}`, got {', '.join(map(str, runs.columns))}."
            )
    rows = runs[runs.projection != "full"] if "projection" in runs else runs
    if not len(rows):
        raise ValueError(
            f"A table must hold runs in a subspace, got {len(runs)} of full training alone; add the runs."
        )
    d = pd.to_numeric(rows.d, errors="coerce")
    wrong = ~((d >= 1) & (d % 1 == 0))
    if wrong.any():
        raise ValueError(f"`d` must be an integer of at least 1 in every row, got {rows.d[wrong].tolist()[0]!r}.")
    if rows.seed.isna().any():
        raise ValueError(
            f"`seed` must be given in every row, {int(rows.seed.isna().sum())} of {len(rows)} have none; number them."
        )
    if not pd.api.types.is_numeric_dtype(rows[metric]):
        raise ValueError(f"`{metric}` must be numbers, got {rows[metric].dtype}; convert it, with NaN for no number.")
    return rows.assign(d=d.astype(int))


def _check_repeated(runs: pd.DataFrame, key: list[str]) -> None:
    repeated = runs.duplicated(key, keep=False)
    if not repeated.any():
        return
    d, seed = runs.loc[repeated, ["d", "seed"]].iloc[0]
    copies = runs[(runs.d == d) & (runs.seed == seed) & repeated]
    columns = [str(column) for column in runs if copies[column].astype(str).nunique() > 1]
    raise ValueError(
        f"A table must hold each run once, got d = {d}, seed = {seed} {len(copies)} times"
        + (f", which differ in {', '.join(columns)}; take one of those." if columns else "; drop the duplicates.")
    )


def numbers(values: pd.Series) -> np.ndarray:
    """float64, with NaN for every run without a finite number, such as one that diverged."""
    values = values.to_numpy(float)
    return np.where(np.isfinite(values), values, np.nan)


def running_maximum(runs: pd.DataFrame, metric: str = "final_accuracy", larger_is_better: bool = True) -> pd.DataFrame:
    """Replace each metric by the best of the same seed at any d' <= d (Larsen et al. 2021).

    This is for nested subspaces: a lottery subspace of dimension d contains those of smaller dimension, so that it can
    reach what they reached. Runs are kept apart if they differ in dataset, model, D, projection, normalization or
    burn_in, where the table has these columns. A NaN is replaced by the best number at a smaller d. Rows of full
    training stay as they are.

    Raises:
        ValueError: as `success_probability`, except that settings may differ.
    """
    table = runs.reset_index(drop=True)
    rows = checked(table, metric)
    keys = [column for column in (*SETTINGS, "seed") if column in rows]
    _check_repeated(rows, [*keys, "d"])
    sign = 1 if larger_is_better else -1
    signed = (sign * rows[metric].where(np.isfinite(rows[metric]))).loc[rows.sort_values("d").index]
    groups = signed.groupby([rows[key] for key in keys], dropna=False)
    best = sign * groups.transform(lambda metrics: metrics.cummax().ffill())
    return table.assign(**{metric: best.combine_first(table[metric])}).set_index(runs.index)


def check_number(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"`{name}` must be a finite number, got {value!r}; give one.")
    return float(value)


def check_share(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < 1:
        raise ValueError(f"`{name}` must lie between 0 and 1, got {value!r}.")
    return float(value)


def check_integer(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")
    return int(value)
