"""What low-rank training keeps of the accuracy: hidden layers W = B A beside the network as it is (Qu 2023).

The table has a column for each data set, and their average, as the paper's "Avg Acc."; the figure shows the test error
against the inner width of the factors.
"""

from itertools import cycle
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from recipes.lab.results import Results
from recipes.reports.compression import labels, legend_below
from recipes.reports.dimension import markdown, spread
from recipes.reports.figures import MARKERS, save
from recipes.training.settings import Settings


NORMAL = "normal training"
AVERAGE = "average"


def method(run: Settings) -> str:
    return "low rank" if run.rank else NORMAL


def table(runs: list[Settings], results: Results) -> pd.DataFrame:
    """A row a run that has a result: method, model, dataset, rank, seed, accuracy (%), seconds, and what is trained.

    `rank` is the inner width, `trained` how many numbers are. Data sets are averaged for each seed
    that all of them have.
    """
    names, rows = labels(runs, method, besides=("seed", "rank")), []
    for run in runs:
        if not (result := results.load(run)):
            continue
        own = {key: getattr(run, key) for key in ("model", "dataset", "rank", "seed")}
        numbers = {"accuracy": 100 * result["final_accuracy"], "seconds": result["seconds"]["train"]}
        rows.append({"method": names[run.name], **own, "trained": result["d"], **numbers})
    found = pd.DataFrame(rows)
    if not rows:
        return found
    keys = ["model", "method", "rank", "trained", "seed"]
    groups = found.groupby(keys)
    whole = groups.dataset.nunique() == found.groupby("model").dataset.nunique().max()
    average = groups[["accuracy", "seconds"]].mean()[whole].reset_index().assign(dataset=AVERAGE)
    return pd.concat([found, average]) if found.dataset.nunique() > 1 else found


def text(runs: list[Settings], results: Results) -> str:
    """Mean and standard deviation over seeds of the test accuracy after the last epoch."""
    found = table(runs, results)
    columns = list(dict.fromkeys(found.dataset))
    rows = []
    for (model, words, rank, trained), group in found.groupby(["model", "method", "rank", "trained"], sort=False):
        percent = group.groupby("dataset").accuracy.agg(["mean", "std"]).apply(lambda row: spread(*row), axis=1)
        seconds = group.groupby("dataset").seconds.mean().round().astype(int)
        shown = [f"{percent[name]} ({seconds[name]} s)" if name in percent else "" for name in columns]
        shown.append(_lead(found[(found.model == model) & (found.dataset == columns[-1])], words, rank))
        rows.append([model, words, rank or "", f"{trained:,}", group.seed.nunique(), *shown])
    header = ["model", "method", "inner width", "numbers trained", "seeds", *(f"{name} %" for name in columns)]
    header.append(f"ahead of normal, {columns[-1]}")
    return "\n".join(["Test accuracy after the last epoch (seconds of training a run):", "", *markdown(header, rows)])


def _lead(found: pd.DataFrame, words: str, rank: int) -> str:
    """Points ahead of normal training from the same seed, which draws the same network and the same batches."""
    by_seed = found.pivot_table(index="seed", columns=["method", "rank"], values="accuracy")
    if not rank or (NORMAL, 0) not in by_seed or (words, rank) not in by_seed:
        return ""
    lead = (by_seed[words, rank] - by_seed[NORMAL, 0]).dropna()
    return spread(lead.mean(), lead.std()) if len(lead) else ""


def plot(runs: list[Settings], results: Results, file: Path) -> Path:
    """A panel for each data set, and one for their average: test error against the inner width."""
    found = table(runs, results)
    panels = list(found.groupby(["model", "dataset"], sort=False))
    size = (max(4.2 * len(panels), 6.4), 4.6)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for axis, ((model, dataset), runs_here) in zip(axes[0], panels, strict=True):
        _panel(axis, runs_here)
        axis.set(title=f"{model}, {dataset}", xlabel="inner width")
    axes[0][0].set_ylabel("test error after the last epoch, %")
    legend_below(figure, columns=max(2, len(panels)))
    return save(figure, file)


def _panel(axis: Axes, found: pd.DataFrame) -> None:
    found = found.assign(error=100 - found.accuracy)
    for style, (words, series) in zip(
        cycle(["-", "--", ":"]), found[found["rank"] == 0].groupby("method"), strict=False
    ):
        mean, deviation = series.error.mean(), series.error.std()
        axis.axhline(mean, color="black", linestyle=style, linewidth=1, label=words)
        axis.axhspan(mean - deviation, mean + deviation, color="black", alpha=0.1, linewidth=0)
    for marker, (words, series) in zip(cycle(MARKERS), found[found["rank"] > 0].groupby("method"), strict=False):
        of_width = series.groupby("rank").error.agg(["mean", "std"])
        axis.errorbar(of_width.index, of_width["mean"], of_width["std"], marker=marker, capsize=3, label=words)
    widths = sorted({width for width in found["rank"] if width})
    axis.set_xscale("log")
    axis.set_xticks(widths, [str(width) for width in widths])
    axis.set_xticks([], minor=True)
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.3)
