"""What a comparison of subspaces says: accuracy against the compression ratio D / d (Larsen et al. 2021, figure 6).

The methods are those of the paper's table 1, by what the settings of a run say: axis-aligned or not, chosen at random
or by training, from the start or from step t. The lottery subspaces of one trajectory are nested: what a smaller one
reaches is in a larger one too, and a lower accuracy there is a failure of the optimiser. So they have the running
maximum over d of each seed, and dashed in the figure what was reached at each d (figure 10).
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from recipes.lab.results import Results
from recipes.reports.dimension import dimension, markdown, spread
from recipes.reports.figures import MARKERS, save
from recipes.reports.records import table as trainings
from recipes.training.settings import Settings
from subspace_peft.measure import intrinsic_dimension, running_maximum


ACCURACIES = {"test accuracy": "final_accuracy", "training accuracy": "final_train_accuracy"}  # after the last epoch
FULL = "full training"
FRACTION = 0.99
"""Of full training's mean test accuracy: the smallest d that reaches it is looked for."""


class Comparison(NamedTuple):
    """The runs of one data set and model that have a result."""

    title: str
    methods: dict[str, pd.DataFrame]  # by label, a row a run
    nested: set[str]  # labels of lottery subspaces
    full: pd.DataFrame


def method(run: Settings) -> str:
    """In the words of Larsen et al., table 1."""
    if run.projection == "full":
        return FULL
    if run.projection == "basis":
        words = "lottery subspace" if run.increments else "subspace of a trajectory's points"
    elif run.projection == "coordinate":
        words = "lottery ticket" if run.trajectory else "random pruning"
        words += "" if run.pruned else ", the rest at the origin"
    else:
        words = "burn-in affine" if run.burn_in else "random affine"
    return words + (f", t = {run.burn_in}" if run.burn_in else "")


def labels(
    runs: Iterable[Settings], words: Callable[[Settings], str] = method, besides: Iterable[str] = ("d", "seed")
) -> dict[str, str]:
    """By the run's name: its words, and the settings in which runs of the same words on the same task differ.

    Args:
        besides: Settings that do not tell runs apart.
    """
    alike, found = {}, {}
    for run in runs:
        alike.setdefault((words(run), run.dataset, run.model), []).append(run)
    for (own, *_), members in alike.items():
        records = [_flat(run, set(besides)) for run in members]
        keys = dict.fromkeys(key for record in records for key in record)  # some have a trajectory, some have none
        varying = [key for key in keys if len({record.get(key) for record in records}) > 1]
        for run, record in zip(members, records, strict=True):
            said = [f"{key.replace('_', ' ')} {record[key]}" for key in varying if key in record]
            found[run.name] = ", ".join([own, *said])
    return found


def _flat(run: Settings, besides: set[str]) -> dict[str, object]:
    """The settings that may tell runs apart, those of the trajectory among them."""
    sampled = run.trajectory.record() if run.trajectory else {}
    own = {key: value for key, value in run.record().items() if key not in besides | {"trajectory"}}
    return own | {f"trajectory {key}": value for key, value in sampled.items() if key not in besides | {"trajectory"}}


def comparisons(runs: list[Settings], results: Results) -> list[Comparison]:
    """One for each data set and model that has a result, with methods in the order of the recipe."""
    names, found = labels(runs), []
    for dataset, model in dict.fromkeys((run.dataset, run.model) for run in runs):
        here = [run for run in runs if (run.dataset, run.model) == (dataset, model)]
        order = dict.fromkeys(names[run.name] for run in here if run.projection != "full")
        tables = {label: trainings([run for run in here if names[run.name] == label], results) for label in order}
        nested = {names[run.name] for run in here if run.projection == "basis" and run.increments}
        full = trainings([run for run in here if run.projection == "full"], results)
        tables = {label: table for label, table in tables.items() if len(table)}
        if tables or len(full):
            found.append(Comparison(f"{model} on {dataset}", tables, nested, full))
    return found


def lines(comparison: Comparison, metric: str) -> dict[str, pd.DataFrame]:
    """By method, the runs; of lottery subspaces both the running maximum of the metric and the runs themselves."""
    found = {}
    for label, table in comparison.methods.items():
        if metric not in table:
            continue
        if label in comparison.nested:
            found[f"{label}, running maximum"] = running_maximum(table, metric=metric)
        found[label] = table
    return found


def text(runs: list[Settings], results: Results) -> str:
    """For each task: mean and standard deviation of test accuracies, and the d that comes near full training."""
    parts = []
    for comparison in comparisons(runs, results):
        parts += [f"**{comparison.title}**{_of_full(comparison.full)}. Test accuracy after the last epoch, %:", ""]
        parts += [*_accuracies(comparison, "final_accuracy"), ""]
        if comparison.nested:
            parts += ["The running maximum is the best of all d' up to d of the same seed, by the test images.", ""]
        if any((table.best_accuracy > table.final_accuracy).any() for table in comparison.methods.values()):
            parts += ["At the epoch that is best on the test images, %:", ""]
            parts += [*_accuracies(comparison, "best_accuracy"), ""]
        if len(comparison.full) and comparison.methods:
            parts += [
                f"The smallest d whose mean final test accuracy reaches {100 * FRACTION:g} % of full training's:"
            ]
            parts += ["", *_dimensions(comparison), ""]
    return "\n".join(parts).rstrip()


def _of_full(full: pd.DataFrame) -> str:
    if not len(full):
        return ""
    percent = 100 * full.final_accuracy
    return f", D = {full.D.iloc[0]}; full training {spread(percent.mean(), percent.std())} % ({len(full)} seeds)"


def _accuracies(comparison: Comparison, metric: str) -> list[str]:
    found = lines(comparison, metric)
    grid = sorted({d for table in found.values() for d in table.d})
    rows = []
    for label, table in found.items():
        seeds = table.groupby("d").seed.nunique()
        of_d = (100 * table[metric]).groupby(table.d).agg(["mean", "std"]).apply(lambda row: spread(*row), axis=1)
        rows.append([label, _span(seeds.min(), seeds.max()), *(of_d.get(d, "") for d in grid)])
    return markdown(["method", "seeds", *(f"d = {d}" for d in grid)], rows)


def _span(low: int, high: int) -> str:
    return f"{low}" if low == high else f"{low} to {high}"


def _dimensions(comparison: Comparison) -> list[str]:
    rows = []
    for label, table in lines(comparison, "final_accuracy").items():
        found = intrinsic_dimension(table, fraction=FRACTION, baseline=comparison.full)
        ratio = f"{table.D.iloc[0] / found.d:.1f}" if found.d else ""
        rows.append([label, dimension(found), ratio])
    return markdown(["method", "d (95 % interval)", "D / d"], rows)


def plot(runs: list[Settings], results: Results, file: Path) -> Path:
    """A row for each task: test and training accuracy against D / d, mean and one standard deviation over seeds."""
    tasks = comparisons(runs, results)
    size = (12.8, 4.2 * len(tasks) + 1.2)  # below the panels stands the legend
    figure, axes = plt.subplots(len(tasks), len(ACCURACIES), figsize=size, squeeze=False, layout="constrained")
    styles = {label: f"C{i % 10}" for i, label in enumerate(dict.fromkeys(m for task in tasks for m in task.methods))}
    for row, task in zip(axes, tasks, strict=True):
        for axis, (name, metric) in zip(row, ACCURACIES.items(), strict=True):
            _panel(axis, task, metric, styles)
            axis.set(title=task.title, xlabel="compression ratio D / d", ylabel=f"{name} after the last epoch, %")
    legend_below(figure, columns=3)
    return save(figure, file)


def legend_below(figure: Figure, columns: int) -> None:
    """One legend of what the panels of a figure show, each label once."""
    drawn = [zip(*axis.get_legend_handles_labels(), strict=True) for axis in figure.axes]
    handles = {label: handle for panel in drawn for handle, label in panel}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize="small")


def _panel(axis: Axes, task: Comparison, metric: str, colors: dict[str, str]) -> None:
    found = lines(task, metric)
    for label, table in found.items():
        own = label.removesuffix(", running maximum")
        of_d = (100 * table[metric]).groupby(table.D / table.d).agg(["mean", "std"])
        raw = own in task.nested and own == label
        style = "--" if raw else "-"
        marker = "" if raw else MARKERS[list(colors).index(own) % len(MARKERS)]
        axis.plot(of_d.index, of_d["mean"], style, marker=marker, color=colors[own], markersize=5, label=label)
        if not raw:
            band = of_d["mean"] - of_d["std"], of_d["mean"] + of_d["std"]
            axis.fill_between(of_d.index, *band, color=colors[own], alpha=0.15, linewidth=0)
    if metric in task.full:
        axis.axhline(100 * task.full[metric].mean(), color="black", linestyle=":", label=FULL)
    axis.set_xscale("log")
    axis.grid(alpha=0.3)
