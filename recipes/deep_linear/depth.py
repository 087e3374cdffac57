"""Depth 2 against 3, and the width, in matrix completion: what is learned of the entries that are not seen (Qu 2023).
python recipes/run.py recipes/deep_linear/depth.yaml
"""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.ticker import LogLocator, NullFormatter

from recipes.deep_linear.completion import reached
from recipes.lab.results import Results
from recipes.lab.settings import PlainSettings
from recipes.reports.figures import count, headline, panels, save, style
from recipes.reports.tables import markdown


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
    rows = []
    for (depth, width, seen), group in table(results.records(runs)).groupby(["depth", "width", "seen"]):
        errors = ", ".join(f"{error:.1e}" for error in group.error)
        learned = ", ".join("-" if pd.isna(n) else f"{n:.0f}" for n in group.learned)
        rows.append([depth, width, seen, errors, learned, ", ".join(map(str, group.its))])
    header = ["depth", "width", "seen", "error, by seed", f"iterations to error {LEVEL:g}", "iterations in all"]
    return "\n".join(markdown(header, rows))


def plot(runs: list[PlainSettings], results: Results, file: Path) -> Path:
    """The error against the share seen, at full width; iterations against the width."""
    whole = table(results.records(runs))
    widest, shared = whole.width.max(), whole[whole.width < whole.width.max()].seen.unique()
    figure, (axes,) = panels(1, 2, width=5.5, height=4.0)
    for at, (depth, group) in enumerate(whole.groupby("depth")):
        by_seen = group[group.width == widest].groupby("seen").error
        share = 100 * by_seen.median().index
        axes[0].plot(share, by_seen.median(), label=f"{depth} layers", **style(at))
        axes[0].fill_between(share, by_seen.min(), by_seen.max(), alpha=0.2, linewidth=0)
        by_width = group[group.seen.isin(shared)].groupby("width").learned
        axes[1].plot(by_width.mean(), label=f"{depth} layers", **style(at))
    axes[0].set(yscale="log", xlabel="entries seen, %", ylabel="relative error, all entries")
    axes[0].set_title(f"How well the whole matrix is found, width {widest}")
    seen = " and ".join(f"{100 * each:g} %" for each in shared)
    axes[1].set(xlabel="width", ylabel=f"iterations to an error of {LEVEL:g}", yscale="log")
    axes[1].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[1].yaxis.set_major_formatter(count)
    axes[1].yaxis.set_minor_formatter(NullFormatter())
    axes[1].set_title(f"How soon, {seen} seen (no point: never)")
    for axis in axes:
        axis.legend()
    headline(figure, "What does depth do for matrix completion?")
    return save(figure, file)
