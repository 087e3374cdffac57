"""The figure of a sweep: accuracy against d for each projection, from the results that are there.

The band is one standard deviation over seeds, open markers are the d_int90 of the papers, at the absolute threshold.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from recipes.reports import dimension as summary


MARKERS = "ov^sDPX*"


def plot(
    runs: pd.DataFrame, published: dict[str, dict[str, int]], file: Path, absolute: summary.Absolute = summary.ABSOLUTE
) -> Path:
    """One panel for each data set and model, in `file`."""
    tasks = list(summary.by_d(runs).groupby(summary.TASK))
    figure, axes = plt.subplots(1, len(tasks), figsize=(6.4 * len(tasks), 4.8), squeeze=False, layout="constrained")
    for axis, ((dataset, model), table) in zip(axes[0], tasks, strict=True):
        panel(axis, table, published.get(model, {}), 100 * summary.level_of(absolute, model))
        axis.set_title(f"{model} on {dataset}")
    return save(figure, file)


def save(figure: Figure, file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    plt.close(figure)
    return file


def panel(axis: Axes, table: pd.DataFrame, published: dict[str, int], absolute: float) -> None:
    """Mean final accuracy (%) of each projection and of full training, and both thresholds."""
    full = table[table.projection == "full"].final
    for marker, (projection, line) in zip(MARKERS, table[table.d > 0].groupby("projection"), strict=False):
        (curve,) = axis.plot(line.d, line.final, marker=marker, label=projection)
        low, high = line.final - line.final_sd, line.final + line.final_sd
        axis.fill_between(line.d, low, high, color=curve.get_color(), alpha=0.15)
    if len(full):
        axis.axhline(full.iloc[0], color="black", linewidth=1, label=f"full, {full.iloc[0]:.1f} %")
        relative = 0.9 * full.iloc[0]
        axis.axhline(relative, color="grey", linestyle="--", linewidth=1, label=f"90 % of full, {relative:.1f} %")
    axis.axhline(absolute, color="grey", linestyle=":", linewidth=1, label=f"{absolute:g} %")
    for marker, (source, d) in zip(reversed(MARKERS), published.items(), strict=False):
        axis.plot(d, absolute, marker, color="black", markersize=9, fillstyle="none", label=f"{source}: {d}")
    axis.set(xlabel="d", ylabel="test accuracy after the last epoch, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small", loc="best")
