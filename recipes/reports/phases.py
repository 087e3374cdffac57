"""Where random subspaces begin to reach an accuracy: the phase diagrams of Larsen et al. 2021, figures 2, 3 and 12.

The figure has maps of the success probability P_s(d, epsilon, t) without and with the longest burn-in, and for each t
the accuracy that all runs but one reach: the threshold training dimension d*(epsilon, t, delta), read from the other
axis. Left of d = 1 stands the origin, which the steps of burn-in reach by themselves.

t is the number of steps of burn-in. delta is such that all runs but one must reach the accuracy, as in the paper: 0.1
of ten runs, 0.2 of five, 0.33 of three.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.ticker import FixedLocator

from recipes.lab.results import Results
from recipes.reports.dimension import check as check
from recipes.reports.dimension import dimension
from recipes.reports.figures import count, counted, edges, headline, panels, save, sparse, style
from recipes.reports.labels import labels, name
from recipes.reports.records import table
from recipes.reports.tables import markdown, over_seeds, span
from recipes.training.settings import Settings
from subspace_peft.measure import threshold_dimension


METRICS = {  # in words: of a run, of its origin
    "training accuracy": ("best_train_accuracy", "train_accuracy"),  # "the lowest loss found in the plane"
    "test accuracy": ("final_accuracy", "test_accuracy"),  # test images choose no epoch
}
LEVELS = np.arange(1001) / 1000  # accuracies of the map
ROUND = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99)
"""Thresholds of the table: the five highest that full training or some run reaches."""
ORIGIN = 4
"""How far left of the smallest d the origin is drawn, as a factor."""


class Diagram(NamedTuple):
    """The runs of one data set, model and kind of subspace that have a result."""

    title: str
    D: int
    runs: pd.DataFrame
    origins: pd.DataFrame  # burn_in, seed, and the accuracies at theta_d = 0
    full: pd.DataFrame

    @property
    def seeds(self) -> int:
        """The most runs at one d and t."""
        return self.runs.groupby(["burn_in", "d"]).size().max()

    @property
    def delta(self) -> float:
        return 1 / max(self.seeds, 2)  # a single run must succeed

    @property
    def burn_in(self) -> list[int]:
        return sorted(self.runs.burn_in.unique())

    @property
    def metrics(self) -> dict[str, tuple[str, str]]:
        return {words: columns for words, columns in METRICS.items() if columns[0] in self.runs}

    def of_full(self, metric: str) -> float:
        return self.full[metric].mean() if metric in self.full else float("nan")


def diagrams(runs: list[Settings], results: Results) -> list[Diagram]:
    """In the order of the recipe; subspaces of one task are apart where any setting but d, seed and t differs."""
    inside = [run for run in runs if run.projection != "full" and run.d]
    names = labels(inside, lambda run: name(run.projection), ("d", "seed", "burn_in", "burn_in_lr"))
    sets = list(dict.fromkeys((run.dataset, run.model, names[run.name]) for run in inside))
    made = []
    for dataset, model, label in sets:
        members = [run for run in inside if (run.dataset, run.model, names[run.name]) == (dataset, model, label)]
        rows = table(members, results)
        if not len(rows):
            continue
        several = sum(key[:2] == (dataset, model) for key in sets) > 1
        full = [run for run in runs if (run.projection, run.dataset, run.model) == ("full", dataset, model)]
        title = f"{name(model)} on {name(dataset)}" + (f", {label}" if several else "")
        made.append(Diagram(title, rows.D.iloc[0], rows, origins(members, results), table(full, results)))
    return made


def origins(runs: list[Settings], results: Results) -> pd.DataFrame:
    """One row for each t and seed: the origin is the same at every d."""
    measured = [(run, results.load(run).get("origin")) for run in runs]
    rows = [{"burn_in": run.burn_in, "seed": run.seed} | at for run, at in measured if at]
    columns = ["burn_in", "seed", "train_accuracy", "test_accuracy"]
    return pd.DataFrame(rows, columns=columns).drop_duplicates(["burn_in", "seed"])


def success(runs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """P_s by d at all `LEVELS` at once, for the map: a row each d; a run that gave no number has failed."""
    shares = {d: (line.to_numpy()[:, None] >= LEVELS).mean(0) for d, line in runs.groupby("d")[metric]}
    return pd.DataFrame(shares, index=LEVELS).T


def boundary(runs: pd.DataFrame, metric: str, delta: float) -> pd.Series:
    """By d, the highest accuracy whose d* is at most this d: the curve d*, read from the other axis."""
    reached = success(runs, metric) >= 1 - delta - 1e-9
    return reached.cummax().apply(lambda levels: levels[levels].index.max(), axis=1)


def parts(runs: list[Settings], results: Results) -> dict[str, str]:
    """The tables "training" and "test": d* at round accuracies of training or test images, for each t."""
    tables: dict[str, list[str]] = {"training": [], "test": []}
    for diagram in diagrams(runs, results):
        for words in diagram.metrics:
            full = _full(diagram, words)
            lines = [f"**{diagram.title}**, {_runs(diagram)}; full training: {full}. {_meaning(diagram, words)}", ""]
            tables[words.split()[0]].append("\n".join([*lines, *_thresholds(diagram, words)]))
    return {key: "\n\n".join(each) for key, each in tables.items() if each}


def text(runs: list[Settings], results: Results) -> str:
    """d* at round accuracies, for each t, with its 95 % interval where that is more than this d."""
    return "\n\n".join(parts(runs, results).values())


def _runs(diagram: Diagram) -> str:
    sizes = diagram.runs.groupby(["burn_in", "d"]).size()
    even = "all but one" if diagram.seeds > 1 else "each"
    enough = even if sizes.min() == sizes.max() else "a share of 1 - δ"
    return f"{span(sizes.min(), sizes.max())} runs of each d and t, {enough} must succeed (δ = {diagram.delta:.2f})"


def _full(diagram: Diagram, words: str) -> str:
    metric, _ = METRICS[words]
    if metric not in diagram.full:
        return "no result"
    return f"{over_seeds(100 * diagram.full[metric])} % ({len(diagram.full)} runs)"


def _meaning(diagram: Diagram, words: str) -> str:
    images = diagram.runs.measured.max()
    if words == "training accuracy":
        return f"Training accuracy: of {images} images, at the best epoch."
    return "Test accuracy: after the last epoch."


def _thresholds(diagram: Diagram, words: str) -> list[str]:
    metric, _ = METRICS[words]
    highest, rows = np.fmax(diagram.runs[metric].max(), diagram.of_full(metric)), []
    for threshold in [level for level in ROUND if level <= highest][-5:]:
        stars = [
            dimension(threshold_dimension(runs, threshold, diagram.delta, metric=metric))
            for _, runs in diagram.runs.groupby("burn_in")
        ]
        rows.append([f"{100 * threshold:g}", *stars])
    return markdown([f"{words}, %", *(f"d*, t = {t}" for t in diagram.burn_in)], rows)


def plot(runs: list[Settings], results: Results, file: Path) -> Path:
    """A row for each diagram: two maps, and what all runs but one reach after each burn-in."""
    drawn = diagrams(runs, results)
    figure, axes = panels(max(len(drawn), 1), 3, width=4.2, height=3.9)
    for row, diagram in zip(axes, drawn, strict=False):
        words, (metric, at_origin) = next(iter(diagram.metrics.items()))
        top = 103 * np.fmax(diagram.runs[metric].max(), diagram.of_full(metric))
        ends = diagram.burn_in[:: max(1, len(diagram.burn_in) - 1)][:2]
        for axis, t in zip(row, ends, strict=False):
            mesh = _map(axis, success(diagram.runs[diagram.runs.burn_in == t], metric))
            axis.set(title=f"From step {t} of full training" if t else "From a random start", ylim=(0, top))
        row[1].set_visible(len(ends) > 1)
        bar = figure.colorbar(mesh, ax=row[len(ends) - 1], label="runs that reach it", ticks=[0, 0.5, 1])
        bar.ax.set_yticklabels(["none", "half", "all"])
        _curves(row[2], diagram, metric, at_origin)
        row[2].set(ylim=(0, top), title=f"Reached by all {diagram.seeds} runs but one")
        row[0].set_ylabel(f"{words}, %")
        for axis in row:
            axis.set_xlabel("dimensions trained, d")
    titles = ", ".join(f"{each.title}, {count(each.D)} parameters" for each in drawn)
    headline(figure, f"When do random subspaces succeed? {titles}")
    return save(figure, file)


def _map(axis: Axes, P: pd.DataFrame) -> QuadMesh:
    """From white, no run, to black, all runs; each d in the middle of its column."""
    counted(axis, sparse(P.index), base=2)
    axis.grid(visible=False)
    return axis.pcolormesh(edges(P.index), 100 * LEVELS, P.T[1:], cmap="gray_r", vmin=0, vmax=1, rasterized=True)


def _curves(axis: Axes, diagram: Diagram, metric: str, at_origin: str) -> None:
    """A line for each t; its first point is the origin, which no parameter has moved from."""
    for at, t in enumerate(diagram.burn_in):
        runs, start = (rows[rows.burn_in == t] for rows in (diagram.runs, diagram.origins))
        stars, words = 100 * boundary(runs, metric, diagram.delta), f"after {t} steps" if t else "random start"
        axis.plot(stars.index, stars, label=words, **style(at))
        reached = start[at_origin].sort_values().tolist()
        if reached:
            axis.plot(stars.index[0] / ORIGIN, 100 * reached[min(1, len(reached) - 1)], **style(at))
    full = 100 * diagram.of_full(metric)
    axis.axhline(full, color="black", linestyle="--", linewidth=1, label="full training")
    ticks = sparse(diagram.runs.d)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(FixedLocator([ticks[0] / ORIGIN, *ticks]))
    axis.xaxis.set_major_formatter(lambda d, _: count(d) if d >= ticks[0] else "0")
    axis.legend(fontsize=8.5)
