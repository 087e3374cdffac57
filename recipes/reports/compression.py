"""How few parameters can be trained: accuracy against the compression ratio D / d (Larsen et al. 2021, figure 6).

The methods are those of the paper's table 1, by what the settings of a run say: axis-aligned or not, chosen at random
or by training, from the start or from step t. The lottery subspaces of one trajectory are nested: what a smaller one
reaches is in a larger one too, and a lower accuracy there is a failure of the optimiser. So each seed has the running
maximum over d, beside what was reached at each d (figure 10).
"""

from pathlib import Path
from typing import NamedTuple

import pandas as pd
from matplotlib.axes import Axes

from recipes.lab.results import Results
from recipes.reports.dimension import check as check
from recipes.reports.dimension import dimension
from recipes.reports.figures import GREY, band, count, counted, headline, legend_below, panels, save, style
from recipes.reports.labels import labels, name
from recipes.reports.records import table
from recipes.reports.tables import joined, markdown, over_seeds, span
from recipes.training.settings import Settings
from subspace_peft.measure import intrinsic_dimension, running_maximum


FULL = "full training"
MAXIMUM = ", running maximum"
FRACTION = 0.99
"""The share of full training's mean test accuracy for which the table gives d."""
WIDE = 8
"""Columns from which on a table has one decimal."""
PANELS = {True: "d of the weights are trained", False: "All weights move, along d directions"}
FIGURE = {
    "burn-in affine": "random directions",
    "random affine": "random directions",
    "lottery subspace": "directions of a training (lottery subspace), best up to d",
    "random pruning": "random weights (random pruning)",
    "lottery ticket": "largest weights of a training (lottery ticket)",
}
"""What the legend says in place of the paper's words."""


class Comparison(NamedTuple):
    """The runs of one data set and model that have a result."""

    dataset: str
    model: str
    methods: dict[str, pd.DataFrame]  # by label, a row a run
    nested: set[str]  # labels of lottery subspaces
    full: pd.DataFrame

    @property
    def title(self) -> str:
        return f"{name(self.model)} on {name(self.dataset)}"

    @property
    def D(self) -> int:
        return pd.concat([self.full, *self.methods.values()]).D.iloc[0]


def kind(run: Settings) -> str:
    """In the words of Larsen et al., table 1."""
    if run.projection == "full":
        return FULL
    if run.projection == "basis":
        return "lottery subspace" if run.increments else "subspace of a trajectory's points"
    if run.projection == "coordinate":
        words = "lottery ticket" if run.trajectory else "random pruning"
        return words if run.pruned else f"{words}, the rest at the origin"
    return "burn-in affine" if run.burn_in else "random affine"


def method(run: Settings) -> str:
    return kind(run) + (f", t = {run.burn_in}" if run.burn_in else "")


def comparisons(runs: list[Settings], results: Results) -> list[Comparison]:
    """One for each data set and model that has a result, with methods in the order of the recipe."""
    names, made = labels(runs, method), []
    for dataset, model in dict.fromkeys((run.dataset, run.model) for run in runs):
        members = [run for run in runs if (run.dataset, run.model) == (dataset, model)]
        order = dict.fromkeys(names[run.name] for run in members if run.projection != "full")
        tables = {label: table([run for run in members if names[run.name] == label], results) for label in order}
        nested = {names[run.name] for run in members if run.projection == "basis" and run.increments}
        full = table([run for run in members if run.projection == "full"], results)
        tables = {label: rows for label, rows in tables.items() if len(rows)}
        if tables or len(full):
            made.append(Comparison(dataset, model, tables, nested, full))
    return made


def lines(comparison: Comparison, metric: str) -> dict[str, pd.DataFrame]:
    """By method, the runs; for lottery subspaces both the running maximum of the metric and the runs themselves."""
    chosen = {}
    for label, rows in comparison.methods.items():
        if metric not in rows:
            continue
        if label in comparison.nested:
            chosen[label + MAXIMUM] = running_maximum(rows, metric=metric)
        chosen[label] = rows
    return chosen


def parts(runs: list[Settings], results: Results) -> dict[str, str]:
    """The tables "accuracy", "best" (at the epoch that is best on the test images), and "dimensions"."""
    tables: dict[str, list[str]] = {"accuracy": [], "best": [], "dimensions": []}
    for comparison in comparisons(runs, results):
        title = f"**{comparison.title}**, D = {comparison.D:,}{_full(comparison.full)}."
        nested = "The running maximum is the best of all d' up to d of the same seed, by the test images."
        said = [f"{title} Test accuracy after the last epoch, %:", "", *_accuracies(comparison, "final_accuracy")]
        tables["accuracy"].append("\n".join([*said, *(["", nested] if comparison.nested else [])]))
        if any((rows.best_accuracy > rows.final_accuracy).any() for rows in comparison.methods.values()):
            said = [f"{title} At the epoch that is best on the test images, %:", ""]
            tables["best"].append("\n".join([*said, *_accuracies(comparison, "best_accuracy")]))
        if len(comparison.full) and comparison.methods:
            said = [f"The smallest d whose mean final test accuracy reaches {100 * FRACTION:g} % of full training's:"]
            tables["dimensions"].append("\n".join([*said, "", *_dimensions(comparison)]))
    return {key: "\n\n".join(each) for key, each in tables.items() if each}


def text(runs: list[Settings], results: Results) -> str:
    return joined(parts(runs, results))


def _full(full: pd.DataFrame) -> str:
    return f"; full training {over_seeds(100 * full.final_accuracy)} % ({len(full)} seeds)" if len(full) else ""


def _accuracies(comparison: Comparison, metric: str) -> list[str]:
    drawn = lines(comparison, metric)
    grid = sorted({d for rows in drawn.values() for d in rows.d})
    cells = []
    for label, rows in drawn.items():
        seeds = rows.groupby("d").seed.nunique()
        by_d = (100 * rows[metric]).groupby(rows.d).agg(over_seeds, digits=1 if len(grid) > WIDE else 2)
        cells.append([label, span(seeds.min(), seeds.max()), *(by_d.get(d, "") for d in grid)])
    return markdown(["method", "seeds", *(f"d = {d}" for d in grid)], cells)


def _dimensions(comparison: Comparison) -> list[str]:
    cells = []
    for label, rows in lines(comparison, "final_accuracy").items():
        least = intrinsic_dimension(rows, fraction=FRACTION, baseline=comparison.full)
        cells.append([label, dimension(least), f"{rows.D.iloc[0] / least.d:.1f}" if least.d else ""])
    return markdown(["method", "d (95 % interval)", "D / d"], cells)


def plot(runs: list[Settings], results: Results, file: Path) -> Path:
    """A row for each task: test accuracy against D / d, where single weights move and where all do."""
    tasks = comparisons(runs, results)
    kinds = list(dict.fromkeys(FIGURE.get(kind(run), kind(run)) for run in runs if run.projection != "full"))
    sides = [side for side in PANELS if any(_labels(task, side) for task in tasks)] or [False]
    figure, axes = panels(len(tasks), len(sides), width=11 / len(sides), height=4.6, sharex=True, sharey="row")
    for row, task in zip(axes, tasks, strict=True):
        for axis, side in zip(row, sides, strict=True):
            _panel(axis, task, _labels(task, side), kinds)
            axis.set(title=PANELS[side], xlabel="all parameters / trained ones, D / d")
        row[0].set_ylabel("test accuracy after training, %")
    words = " and ".join(f"{task.title}, {count(task.D)} parameters" for task in tasks)
    headline(figure, f"How few parameters can be trained? {words}")
    legend_below(figure, columns=3 if len(kinds) > 2 else 2)
    return save(figure, file)


def _labels(task: Comparison, aligned: bool) -> list[str]:
    return [label for label, rows in task.methods.items() if (rows.projection.iloc[0] == "coordinate") == aligned]


def _panel(axis: Axes, task: Comparison, shown: list[str], kinds: list[str]) -> None:
    """Mean and one standard deviation over seeds; a colour for each kind, dashed from step t on."""
    dashed = {}
    for label in shown:
        rows, words, t = task.methods[label], label, task.methods[label].burn_in.iloc[0]
        for paper, plain in FIGURE.items():
            words = words.replace(paper, plain)
        words = words.replace(f", t = {t}", "")
        look = style(max(at for at, each in enumerate(kinds) if words.startswith(each)))
        rows = running_maximum(rows, metric="final_accuracy") if label in task.nested else rows
        by_ratio = (100 * rows.final_accuracy).groupby(rows.D / rows.d).agg(["mean", "std"])
        dashed |= {t: f"dashed: from step {t} of a training"} if t else {}
        axis.plot(by_ratio.index, by_ratio["mean"], "--" if t else "-", label=None if t else words, **look)
        band(axis, by_ratio.index, by_ratio["mean"], by_ratio["std"], look["color"])
    for words in dashed.values():
        axis.plot([], [], "--", color=GREY, label=words)
    if len(task.full):
        axis.axhline(100 * task.full.final_accuracy.mean(), color="black", linestyle=":", label=FULL)
    counted(axis)
