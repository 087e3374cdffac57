"""What the results of a sweep say: accuracy by d, and the intrinsic dimension d_int90 of Li et al. 2018."""

from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from recipes.lab.results import Results
from recipes.reports.figures import MARKERS, save
from recipes.reports.records import table as trainings
from recipes.training.settings import Settings
from subspace_peft.measure import Dimension, intrinsic_dimension


TASK = ["dataset", "model"]
Absolute = float | dict[str, float]
"""The accuracy itself that is to be reached, of all models or by model."""
SETTINGS = [f.name for f in fields(Settings) if not f.metadata and f.name not in (*TASK, "projection", "d", "seed")]
ABSOLUTE = 0.9  # of Gargiulo 2023 for MNIST


def apart(runs: pd.DataFrame, settings: list[str] = SETTINGS) -> pd.DataFrame:
    """The runs with the name of their projection made longer by the settings in which runs of it differ.

    So runs that differ in more than d and seed, such as in lr, are never averaged.
    """
    tables = []
    for (*_, projection), table in runs.groupby([*TASK, "projection"], sort=False):
        table = table.assign(
            trajectory=[run and {k: v for k, v in run.items() if k != "seed"} for run in trajectories(table)]
        )
        differing = [key for key in settings if key in table and table[key].astype(str).nunique() > 1]
        if projection == "full" and differing:
            raise ValueError(
                f"Full trainings of one network must differ in seed alone, got several `{differing[0]}`; leave one."
            )
        if differing:
            words = [f"{key.replace('_', ' ')} " + table[key].astype(str) for key in differing]
            names = pd.concat(words, axis=1).agg(", ".join, axis=1)
            table = table.assign(projection=f"{projection}, " + names)
        tables.append(table)
    return pd.concat(tables)


def trajectories(runs: pd.DataFrame) -> list[dict | None]:
    return list(runs.trajectory) if "trajectory" in runs else [None] * len(runs)


def by_d(runs: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over seeds of the accuracy (%) after the last epoch and at the best one."""
    runs = apart(runs)
    percent = runs.assign(final=100 * runs.final_accuracy, best=100 * runs.best_accuracy)
    groups = percent.groupby([*TASK, "projection", "d"])
    return groups.agg(
        seeds=("seed", "nunique"),
        final=("final", "mean"),
        final_sd=("final", "std"),
        best=("best", "mean"),
        best_sd=("best", "std"),
        seconds=("seconds", "mean"),
    ).reset_index()


class Dimensions(NamedTuple):
    """d_int90 of one projection: by 90 % of full training, or by an accuracy itself at the last and the best epoch."""

    task: tuple[str, ...]
    projection: str
    relative: Dimension | None  # None: there is no full training
    absolute: Dimension
    best: Dimension


def dimensions(runs: pd.DataFrame, absolute: Absolute = ABSOLUTE) -> list[Dimensions]:
    """Of every data set, model and projection: the first d of the grid whose mean accuracy over seeds reaches it.

    Without interpolation, so the true value lies above the grid's next smaller d.
    """
    found = []
    for task, rows in apart(runs).groupby(TASK):
        full, level = rows[rows.projection == "full"], level_of(absolute, task[-1])
        for projection, line in rows[rows.projection != "full"].groupby("projection"):
            relative = intrinsic_dimension(line, fraction=0.9, baseline=full) if len(full) else None
            by_last, by_best = (
                intrinsic_dimension(line, absolute=level, metric=metric)
                for metric in ("final_accuracy", "best_accuracy")
            )
            found.append(Dimensions(task, projection, relative, by_last, by_best))
    return found


def level_of(absolute: Absolute, model: str) -> float:
    return absolute.get(model, ABSOLUTE) if isinstance(absolute, dict) else absolute


def dimension(found: Dimension | None) -> str:
    """d, and its interval where that is more than this d; where there is none, the best that was seen."""
    if found is None:
        return ""
    nan = f", {found.nan} runs without a number" if found.nan else ""
    best = f", {100 * found.best[0]:.2f} % at best" if found.best else ""
    d = (str(found.d) if found.d else f"none{best}") + nan
    if not found.interval or found.interval == (found.d, found.d):
        return d
    low, high = (end or f"above {found.largest}" for end in found.interval)
    return f"{d} ({low} to {high})"


def check(runs: list[Settings]) -> None:
    """Raises ValueError for runs that no table could show."""
    apart(pd.DataFrame([run.record() for run in runs]))


def text(runs: list[Settings], results: Results, absolute: Absolute = ABSOLUTE) -> str:
    """Both tables as Markdown."""
    runs = trainings(runs, results)
    accuracies = [
        [*task, projection, d or "all", seeds, spread(final, final_sd), spread(best, best_sd), f"{seconds:.0f}"]
        for *task, projection, d, seeds, final, final_sd, best, best_sd, seconds in by_d(runs).itertuples(index=False)
    ]
    rows = []
    for found in dimensions(runs, absolute):
        share = f"{100 * found.relative.threshold:.2f}" if found.relative else ""
        ds = [dimension(d) for d in (found.relative, found.absolute, found.best)]
        rows.append([*found.task, found.projection, share, ds[0], f"{100 * found.absolute.threshold:g}", *ds[1:]])
    return "\n".join(
        [
            *markdown([*TASK, "projection", "d", "seeds", "final %", "best %", "s a run"], accuracies),
            "",
            "d_int90: the first d of the grid whose mean final accuracy reaches 90 % of full training's, or the",
            "absolute threshold; by the best epoch, which the test data choose, too. In brackets 95 % intervals.",
            "",
            *markdown(
                [*TASK, "projection", "90 % of full", "d_int90", "absolute %", "d_int90, last epoch", "best epoch"],
                rows,
            ),
        ]
    )


def markdown(header: list[str], rows: list[list]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


def spread(mean: float, sd: float) -> str:
    return f"{mean:.2f}" if pd.isna(sd) else f"{mean:.2f} ± {sd:.2f}"


def plot(
    runs: list[Settings],
    results: Results,
    file: Path,
    published: dict[str, dict[str, int]] | None = None,
    absolute: Absolute = ABSOLUTE,
) -> Path:
    """Accuracy against d, a panel for each data set and model. The band is one standard deviation over seeds.

    Args:
        published: d_int90 of the papers, by model and source: open markers at the absolute threshold.
    """
    tasks = list(by_d(trainings(runs, results)).groupby(TASK))
    figure, axes = plt.subplots(1, len(tasks), figsize=(6.4 * len(tasks), 4.8), squeeze=False, layout="constrained")
    for axis, ((dataset, model), table) in zip(axes[0], tasks, strict=True):
        panel(axis, table, (published or {}).get(model, {}), 100 * level_of(absolute, model))
        axis.set_title(f"{model} on {dataset}")
    return save(figure, file)


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
