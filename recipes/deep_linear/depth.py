"""Depth 2 against 3, and the width, in matrix completion: what is learned of the entries that are not seen (Qu 2023).
python recipes/run.py recipes/deep_linear/depth.yaml
"""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

from recipes.deep_linear.completion import reached
from recipes.lab.results import Results
from recipes.lab.settings import PlainSettings
from recipes.reports.dimension import markdown
from recipes.reports.figures import save


LEVEL = 0.1
"""An error that counts as learned, for the iterations that it takes."""


def table(runs: list[dict[str, Any]]) -> pd.DataFrame:
    """One row for each run."""
    rows = []
    for run in runs:
        settings, at = run["settings"], reached(run, LEVEL)
        row = {key: settings[key] for key in ("depth", "width", "seen", "seed")}
        rows.append(row | {"error": run["error"], "its": run["iterations"], "learned": at[0] if at else float("nan")})
    return pd.DataFrame(rows)


def text(runs: list[PlainSettings], results: Results) -> str:
    runs = results.records(runs)
    rows = []
    for (depth, width, seen), group in table(runs).groupby(["depth", "width", "seen"]):
        errors = ", ".join(f"{error:.1e}" for error in group.error)
        learned = ", ".join("-" if pd.isna(n) else f"{n:.0f}" for n in group.learned)
        rows.append([depth, width, seen, errors, learned, ", ".join(map(str, group.its))])
    header = ["depth", "width", "seen", "error, by seed", f"iterations to error {LEVEL:g}", "iterations in all"]
    return "\n".join(markdown(header, rows))


def plot(runs: list[PlainSettings], results: Results, file: Path) -> Path:
    """The error against the share seen, at full width; iterations against the width."""
    runs = results.records(runs)
    all_runs = table(runs)
    widest, shared = all_runs.width.max(), all_runs[all_runs.width < all_runs.width.max()].seen.unique()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for depth, group in all_runs.groupby("depth"):
        by_seen = group[group.width == widest].groupby("seen").error
        axes[0].plot(by_seen.median(), "o-", label=f"depth {depth}")
        axes[0].fill_between(by_seen.min().index, by_seen.min(), by_seen.max(), alpha=0.2)
        by_width = group[group.seen.isin(shared)].groupby("width").learned
        axes[1].plot(by_width.mean(), "o-", label=f"depth {depth}")
    axes[0].set(yscale="log", xlabel="share of entries seen", ylabel="‖W − Φ‖ / ‖Φ‖", title=f"width {widest}")
    axes[1].set(xlabel="width", ylabel=f"iterations to error {LEVEL:g}", yscale="log")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend()
    return save(figure, file)
