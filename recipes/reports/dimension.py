"""How many dimensions a task needs: accuracy by d, and the intrinsic dimension d_int90 of Li et al. 2018.

d_int90 is the first d of the grid whose mean accuracy over seeds reaches 90 % of full training's, or an absolute
threshold. Nothing is interpolated, so the true value lies above the grid's next smaller d.
"""

from pathlib import Path
from typing import NamedTuple

import pandas as pd
from matplotlib.axes import Axes

from recipes.lab.results import Results
from recipes.reports.figures import GREY, MARKERS, band, count, headline, legend_below, panels, save, style
from recipes.reports.labels import distinguishing, flat, labels, name
from recipes.reports.records import table
from recipes.reports.tables import joined, over_seeds, span, without_empty
from recipes.training.settings import Settings
from subspace_peft.measure import Dimension, intrinsic_dimension


Absolute = float | dict[str, float]
"""The accuracy itself that is to be reached, of all networks or by network."""
Published = dict[str, dict[str, int]] | None
"""d_int90 of papers, by network and source."""
ABSOLUTE = 0.9  # of Gargiulo 2023 for MNIST
LAST, BEST = "final_accuracy", "best_accuracy"


class Task(NamedTuple):
    """The runs of one network on one data set that have a result."""

    dataset: str
    model: str
    full: pd.DataFrame  # a row a run
    lines: dict[str, pd.DataFrame]  # the same for each kind of subspace

    @property
    def D(self) -> int:
        return pd.concat([self.full, *self.lines.values()]).D.iloc[0]

    @property
    def title(self) -> str:
        return f"{name(self.model)} on {name(self.dataset)}"


class Dimensions(NamedTuple):
    """d_int90 by 90 % of full training, and by an accuracy itself after the last and at the best epoch."""

    relative: Dimension | None  # None: there is no full training, or one that diverged
    absolute: Dimension
    best: Dimension


def check(runs: list[Settings]) -> None:
    """Raises ValueError for full trainings of one network that differ in more than the seed."""
    tasks: dict[tuple, list] = {}
    for run in runs:
        if run.projection == "full":
            tasks.setdefault((run.dataset, run.model), []).append(flat(run.record(), ("seed",)))
    for records in tasks.values():
        if keys := distinguishing(records):
            raise ValueError(
                f"Full trainings of one network must differ in seed alone, got several `{keys[0]}`; leave one."
            )


def tasks(runs: list[Settings], results: Results) -> list[Task]:
    """In the order of the recipe.

    Raises:
        ValueError: for full trainings of one network that differ in more than the seed.
    """
    check(runs)
    names, made = labels(runs, lambda run: name(run.projection)), []
    for dataset, model in dict.fromkeys((run.dataset, run.model) for run in runs):
        members = [run for run in runs if (run.dataset, run.model) == (dataset, model)]
        full = table([run for run in members if run.projection == "full"], results)
        order = sorted({names[run.name] for run in members if run.projection != "full"})
        lines = {label: table([run for run in members if names[run.name] == label], results) for label in order}
        lines = {label: line for label, line in lines.items() if len(line)}
        if len(full) or lines:
            made.append(Task(dataset, model, full, lines))
    return made


def dimensions(task: Task, absolute: Absolute = ABSOLUTE) -> dict[str, Dimensions]:
    """By the label of the subspace."""
    level = level_of(absolute, task.model)
    has_baseline = len(task.full) and task.full[LAST].notna().all()
    return {
        label: Dimensions(
            intrinsic_dimension(line, fraction=0.9, baseline=task.full) if has_baseline else None,
            intrinsic_dimension(line, absolute=level, metric=LAST),
            intrinsic_dimension(line, absolute=level, metric=BEST),
        )
        for label, line in task.lines.items()
    }


def level_of(absolute: Absolute, model: str) -> float:
    return absolute.get(model, ABSOLUTE) if isinstance(absolute, dict) else absolute


def dimension(measured: Dimension | None) -> str:
    """d, and its interval where that is more than this d; where there is none, the best that was seen."""
    if measured is None:
        return ""
    nan = f", {measured.nan} runs without a number" if measured.nan else ""
    best = f", {100 * measured.best[0]:.2f} % at best" if measured.best else ""
    d = (str(measured.d) if measured.d else f"none{best}") + nan
    if not measured.interval or measured.interval == (measured.d, measured.d):
        return d
    low, high = (end or f"above {measured.largest}" for end in measured.interval)
    return f"{d} ({low} to {high})"


def parts(
    runs: list[Settings], results: Results, absolute: Absolute = ABSOLUTE, published: Published = None
) -> dict[str, str]:
    """The tables "d_int90" and "accuracy"."""
    measured = tasks(runs, results)
    return {
        "d_int90": "\n".join(_dimensions(measured, absolute, published or {})),
        "accuracy": "\n\n".join("\n".join(_accuracies(task)) for task in measured),
    }


def text(runs: list[Settings], results: Results, absolute: Absolute = ABSOLUTE, published: Published = None) -> str:
    return joined(parts(runs, results, absolute, published))


def _dimensions(measured: list[Task], absolute: Absolute, published: dict[str, dict[str, int]]) -> list[str]:
    rows = []
    for task in measured:
        sources = "; ".join(f"{source}: {d}" for source, d in published.get(task.model, {}).items())
        for label, each in dimensions(task, absolute).items():
            share = f"{100 * each.relative.threshold:.2f}" if each.relative else ""
            cells = [f"{task.title}, D = {task.D:,}", label, dimension(each.relative), share]
            cells += [f"{100 * each.absolute.threshold:g}", dimension(each.absolute), dimension(each.best)]
            rows.append([*cells, sources])
            sources = ""  # once for each network
    header = ["network", "P", "d_int90 (95 % interval)", "90 % of full training's, %", "threshold itself, %"]
    return without_empty([*header, "d_int90 by it, last epoch", "d_int90 by it, best epoch", "published"], rows)


def _accuracies(task: Task) -> list[str]:
    """Mean and standard deviation over seeds of the test accuracy after the last epoch, by d."""
    grid = sorted({d for line in task.lines.values() for d in line.d})
    rows = []
    for label, line in task.lines.items():
        seeds = line.groupby("d").seed.nunique()
        by_d = (100 * line[LAST]).groupby(line.d).agg(over_seeds)
        cells = [by_d.get(d, "") for d in grid]
        rows.append([label, span(seeds.min(), seeds.max()), *cells, "", f"{line.seconds.mean():.0f}"])
    if len(task.full):
        whole, seconds = over_seeds(100 * task.full[LAST]), f"{task.full.seconds.mean():.0f}"
        rows.append(["full training", task.full.seed.nunique(), *[""] * len(grid), whole, seconds])
    header = ["P", "seeds", *(f"d = {d}" for d in grid), f"all {task.D:,}", "s a run"]
    return [f"{task.title}, test accuracy after the last epoch, %:", "", *without_empty(header, rows, keep=2)]


def plot(
    runs: list[Settings],
    results: Results,
    file: Path,
    absolute: Absolute = ABSOLUTE,
    published: Published = None,
) -> Path:
    """Accuracy against d, a panel for each data set and network; the band is one standard deviation over seeds.

    Args:
        published: Open markers at the absolute threshold.
    """
    measured = tasks(runs, results)
    columns = min(len(measured), 3)
    rows = -(-len(measured) // columns)
    figure, axes = panels(rows, columns, width=11 / columns if columns > 1 else 7.5, height=4.4)
    kinds = list(dict.fromkeys(label for task in measured for label in task.lines))
    datasets = list(dict.fromkeys(name(task.dataset) for task in measured))
    for axis, task in zip(axes.flat, measured, strict=False):
        _panel(axis, task, kinds, 100 * level_of(absolute, task.model), (published or {}).get(task.model, {}))
        title = task.title if len(datasets) > 1 else name(task.model)
        axis.set(title=f"{title}, {count(task.D)} parameters", xlabel="dimensions trained, d")
    for axis in list(axes.flat)[len(measured) :]:
        axis.set_visible(False)
    for row in axes:
        row[0].set_ylabel("test accuracy after training, %")
    headline(figure, f"How many dimensions does a network need to learn {' and '.join(datasets)}?")
    legend_below(figure, columns=4 + (len(kinds) > 2))
    return save(figure, file)


def _panel(axis: Axes, task: Task, kinds: list[str], absolute: float, published: dict[str, int]) -> None:
    """Mean final accuracy (%) of each kind of subspace and of full training, and both thresholds."""
    for label, line in task.lines.items():
        look = style(kinds.index(label))
        by_d = (100 * line[LAST]).groupby(line.d).agg(["mean", "std"])
        axis.plot(by_d.index, by_d["mean"], label=label, **look)
        band(axis, by_d.index, by_d["mean"], by_d["std"], look["color"])
    levels = [(absolute, f"{absolute:g} % accuracy", ":")]
    if len(task.full):
        full = 100 * task.full[LAST].mean()
        axis.axhline(full, color="black", linewidth=1.2, label="full training")
        levels.append((0.9 * full, "90 % of full training", "--"))
    for level, words, line in levels:
        axis.axhline(level, color=GREY, linestyle=line, linewidth=1.2, label=words)
    points = [
        axis.plot(d, absolute, MARKERS[-1 - at % len(MARKERS)], color="black", markersize=10, fillstyle="none")[0]
        for at, d in enumerate(published.values())
    ]
    if points:
        words = [f"{source}: {d:,}" for source, d in published.items()]
        axis.legend(points, words, title="published", loc="best", fontsize=8.5, alignment="left")
