"""Where random subspaces begin to reach an accuracy: the phase diagrams of Larsen et al. 2021.

- `<recipe>.png`, figures 2, 3, 7 and 8: the success probability P_s(d, epsilon, t) as a grey map, 1 is black, with the
  threshold training dimension d*(epsilon, t, delta) on it; the last column has all d* together.
- `<recipe>.small.png`, figure 12: the mean accuracy up to d = 128, with that of the origin at d = 0.

t is the number of steps of burn-in. delta is such that all runs but one must reach the accuracy, as in the paper: 0.1
of ten runs, 0.2 of five, 0.33 of three.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from recipes.lab.results import Results
from recipes.reports.compression import labels, legend_below
from recipes.reports.dimension import dimension, markdown, spread
from recipes.reports.figures import MARKERS, save
from recipes.reports.records import table as trainings
from recipes.training.settings import Settings
from subspace_peft.measure import threshold_dimension


METRICS = {  # in words: of a run, of its origin
    "training accuracy": ("best_train_accuracy", "train_accuracy"),  # "the lowest loss found in the plane"
    "test accuracy": ("final_accuracy", "test_accuracy"),  # test images choose no epoch
}
LEVELS = np.arange(1001) / 1000  # accuracies of the map
ROUND = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99)
"""Thresholds of the table: the five highest that full training or some run reaches."""
SMALL = 128
"""The largest d of figure 12."""


class Diagram(NamedTuple):
    """The runs of one data set, model and kind of subspace that have a result."""

    title: str
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
    def metrics(self) -> dict[str, tuple[str, str]]:
        return {name: columns for name, columns in METRICS.items() if columns[0] in self.runs}

    def of_full(self, metric: str) -> float:
        return self.full[metric].mean() if metric in self.full else float("nan")


def diagrams(runs: list[Settings], results: Results) -> list[Diagram]:
    """In the order of the recipe; subspaces of one task are apart where any setting but d, seed and t differs."""
    inside = [run for run in runs if run.projection != "full" and run.d]
    names = labels(inside, lambda run: run.projection, ("d", "seed", "burn_in", "burn_in_lr"))
    sets = list(dict.fromkeys((run.dataset, run.model, names[run.name]) for run in inside))
    found = []
    for dataset, model, name in sets:
        mine = [run for run in inside if (run.dataset, run.model, names[run.name]) == (dataset, model, name)]
        table = trainings(mine, results)
        if not len(table):
            continue
        several = sum(key[:2] == (dataset, model) for key in sets) > 1
        full = [run for run in runs if (run.projection, run.dataset, run.model) == ("full", dataset, model)]
        title = f"{model} on {dataset}" + (f", {name}" if several else "")
        found.append(Diagram(title, table, origins(mine, results), trainings(full, results)))
    return found


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


def text(runs: list[Settings], results: Results) -> str:
    """d* at round accuracies, for each t, with its 95 % interval where that is more than this d."""
    parts = []
    for diagram in diagrams(runs, results):
        parts += [f"**{diagram.title}**, {_runs(diagram)}; full training: {_full(diagram)}. {_meaning(diagram)}", ""]
        parts += [*_thresholds(diagram), ""]
    return "\n".join(parts).rstrip()


def _runs(diagram: Diagram) -> str:
    sizes = diagram.runs.groupby(["burn_in", "d"]).size()
    n = f"{sizes.min()} to {sizes.max()}" if sizes.min() < sizes.max() else str(sizes.max())
    even = "all but one" if diagram.seeds > 1 else "each"
    enough = even if sizes.min() == sizes.max() else "a share of 1 - δ"
    return f"{n} runs of each d and t, {enough} must succeed (δ = {diagram.delta:.2f})"


def _full(diagram: Diagram) -> str:
    values = {name: 100 * diagram.full[metric] for name, (metric, _) in METRICS.items() if metric in diagram.full}
    words = [f"{name} {spread(percent.mean(), percent.std())} %" for name, percent in values.items()]
    return f"{', '.join(words)} ({len(diagram.full)} runs)" if words else "no result"


def _meaning(diagram: Diagram) -> str:
    images = diagram.runs.measured.max()
    training = f"Training accuracy: of {images} images, at the best epoch; test" if images else "Test"
    return f"{training} accuracy: after the last epoch."


def _thresholds(diagram: Diagram) -> list[str]:
    rows = []
    for name, (metric, _) in diagram.metrics.items():
        highest = np.fmax(diagram.runs[metric].max(), diagram.of_full(metric))
        for threshold in [level for level in ROUND if level <= highest][-5:]:
            stars = [
                dimension(threshold_dimension(runs, threshold, diagram.delta, metric=metric))
                for _, runs in diagram.runs.groupby("burn_in")
            ]
            rows.append([name, f"{100 * threshold:g}", *stars])
    burn_in = sorted(diagram.runs.burn_in.unique())
    return markdown(["accuracy", "threshold %", *(f"d*, t = {t}" for t in burn_in)], rows)


def plot(runs: list[Settings], results: Results, file: Path) -> list[Path]:
    """Both figures, where there is a run in a subspace; see above."""
    found = diagrams(runs, results)
    return found and [_plot_maps(found, file), _plot_small(found, file.with_suffix(f".small{file.suffix}"))]


def _plot_maps(found: list[Diagram], file: Path) -> Path:
    rows = [(diagram, name, metric) for diagram in found for name, (metric, _) in diagram.metrics.items()]
    burn_in = sorted({t for diagram in found for t in diagram.runs.burn_in})
    shape = len(rows), len(burn_in) + 1
    size = (2.6 * shape[1] + 0.6, 2.5 * shape[0] + 0.6)
    figure, axes = plt.subplots(*shape, figsize=size, sharey="row", squeeze=False, layout="constrained")
    for line, (diagram, name, metric) in zip(axes, rows, strict=True):
        top = 103 * np.fmax(diagram.runs[metric].max(), diagram.of_full(metric))
        for i, (t, axis) in enumerate(zip(burn_in, line, strict=False)):
            runs = diagram.runs[diagram.runs.burn_in == t]
            if not len(runs):
                axis.set_visible(False)
                continue
            axis.set_title(f"burn-in, t = {t}" if t else "no burn-in")
            _map(axis, success(runs, metric))
            for each in (axis, line[-1]):
                stars = 100 * boundary(runs, metric, diagram.delta)
                each.plot(
                    stars.index, stars, color=f"C{i}", marker=MARKERS[i % len(MARKERS)], markersize=4, label=f"t = {t}"
                )
        line[-1].set_title(f"d*, δ = {diagram.delta:.2f}")
        line[-1].grid(alpha=0.3)
        for axis in line:
            label = "full training" if axis is line[-1] else None  # the last in the legend
            axis.axhline(100 * diagram.of_full(metric), color="black", linestyle="--", linewidth=1, label=label)
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_locator(LogLocator(base=4))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.tick_params("x", labelsize="small")
            axis.set(xlim=_edges(diagram.runs.d)[[0, -1]], ylim=(0, top), xlabel="d")
        first = next(axis for axis in line if axis.get_visible())
        first.set_ylabel(f"{diagram.title}\n{name}, %")
        first.tick_params("y", labelleft=True)
    legend_below(figure, columns=shape[1])
    return save(figure, file)


def _map(axis: Axes, P: pd.DataFrame) -> None:
    """Grey from 0, white, to 1, black; each d in the middle of its column."""
    axis.pcolormesh(_edges(P.index), 100 * LEVELS, P.T[1:], cmap="gray_r", vmin=0, vmax=1, rasterized=True)


def _edges(d: Iterable[int]) -> np.ndarray:
    """Half-way between the neighbours of a grid on a log axis, and as far beyond its ends."""
    places = np.log2(np.unique(d))
    steps = np.diff(places) if len(places) > 1 else np.ones(1)
    around = np.concatenate([[places[0] - steps[0]], places, [places[-1] + steps[-1]]])
    return 2 ** ((around[1:] + around[:-1]) / 2)


def _plot_small(found: list[Diagram], file: Path) -> Path:
    size = (6.4 * len(METRICS), 4.2 * len(found))
    figure, axes = plt.subplots(len(found), len(METRICS), figsize=size, squeeze=False, layout="constrained")
    burn_in = sorted({t for diagram in found for t in diagram.runs.burn_in})
    for line, diagram in zip(axes, found, strict=True):
        for axis, (name, (metric, at_origin)) in zip(line, METRICS.items(), strict=True):
            if metric not in diagram.runs:
                axis.set_visible(False)
                continue
            start = diagram.origins.assign(d=0, value=diagram.origins[at_origin])
            table = diagram.runs.assign(value=diagram.runs[metric])
            table = pd.concat([start, table]) if len(start) else table
            for t, rows in table[table.d <= SMALL].groupby("burn_in"):
                i = burn_in.index(t)
                of_d = (100 * rows.value).groupby(rows.d).agg(["mean", "std"])
                axis.plot(
                    of_d.index,
                    of_d["mean"],
                    color=f"C{i}",
                    marker=MARKERS[i % len(MARKERS)],
                    markersize=4,
                    label=f"t = {t}",
                )
                band = of_d["mean"] - of_d["std"], of_d["mean"] + of_d["std"]
                axis.fill_between(of_d.index, *band, color=f"C{i}", alpha=0.15, linewidth=0)
            axis.set(title=diagram.title, xlabel="d; at 0, the origin", ylabel=f"{name}, %")
            axis.grid(alpha=0.3)
    legend_below(figure, columns=len(burn_in))
    return save(figure, file)
