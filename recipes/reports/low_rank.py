"""What low-rank training keeps of the accuracy: hidden layers W = B A beside the network as it is (Qu 2023).

The table has a column for each data set, and their average, as the paper's "Avg Acc."; the figure shows the test error
against the inner width of the factors, or against the learning rate where there are several.
"""

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from recipes.lab.results import Results
from recipes.reports.figures import COLOURS, MARKERS, headline, legend_below, panels, plain_ticks, save, style
from recipes.reports.labels import labels, name
from recipes.reports.tables import by_rate, over_seeds, without_empty
from recipes.training.settings import Settings


NORMAL = "normal training"
AVERAGE = "average"


def method(run: Settings) -> str:
    return "low rank" if run.rank else NORMAL


def table(runs: list[Settings], results: Results) -> pd.DataFrame:
    """One row for each run that has a result; `rank` is the inner width, `trained` the number of trained parameters.

    Data sets are averaged for each seed that all of them have.
    """
    names, rows = labels(runs, method, besides=("seed", "rank")), []
    for run in runs:
        if not (result := results.load(run)):
            continue
        settings = {key: getattr(run, key) for key in ("model", "dataset", "rank", "lr", "start", "seed")}
        measured = {"accuracy": 100 * result["final_accuracy"], "seconds": result["seconds"]["train"]}
        rows.append({"method": names[run.name], **settings, "trained": result["d"], **measured})
    whole = pd.DataFrame(rows)
    if not rows:
        return whole
    keys = ["model", "method", "rank", "lr", "start", "trained", "seed"]
    groups = whole.groupby(keys)
    complete = groups.dataset.nunique() == whole.groupby("model").dataset.nunique().max()
    average = groups[["accuracy", "seconds"]].mean()[complete].reset_index().assign(dataset=AVERAGE)
    return pd.concat([whole, average]) if whole.dataset.nunique() > 1 else whole


def check(runs: list[Settings]) -> None:
    """Raises ValueError for runs that are neither normal nor low-rank training."""
    for run in runs:
        if run.projection != "full" and not run.rank:
            raise ValueError(
                f"A report of low-rank training shows full training and runs with a `rank`, got {run}; leave it out."
            )


def text(runs: list[Settings], results: Results) -> str:
    """Mean and standard deviation over seeds of the test accuracy after the last epoch; by rate, where several are."""
    measured = table(runs, results)
    if measured.lr.nunique() > 1:
        shown = measured[measured.dataset == measured.dataset.iloc[-1]]
        shown = shown.assign(rate=shown.lr, method=shown.method.str.split(",").str[0], start=_starts(shown))
        keys = {"method": "method", "rank": "inner width", "start": "start of the factors"}
        return "\n".join(["Test accuracy after the last epoch by learning rate, %:", "", *by_rate(shown, keys)])
    columns = list(dict.fromkeys(measured.dataset))
    rows = []
    for (model, words, rank, trained), group in measured.groupby(["model", "method", "rank", "trained"], sort=False):
        percent = group.groupby("dataset").accuracy.agg(over_seeds)
        seconds = group.groupby("dataset").seconds.mean().round().astype(int)
        shown = [f"{percent[data]} ({seconds[data]} s)" if data in percent else "" for data in columns]
        shown.append(_lead(measured[(measured.model == model) & (measured.dataset == columns[-1])], words, rank))
        network = name(model) if measured.model.nunique() > 1 else ""
        rows.append([words, network, rank or "", f"{trained:,}", group.seed.nunique(), *shown])
    header = [
        "method",
        "network",
        "inner width",
        "parameters trained",
        "seeds",
        *(f"{name(data)} %" for data in columns),
    ]
    lines = without_empty([*header, f"ahead of normal, {name(columns[-1])}"], rows)
    return "\n".join(["Test accuracy after the last epoch (seconds of training a run):", "", *lines])


def _starts(measured: pd.DataFrame) -> pd.Series:
    return measured.start.where(measured["rank"] > 0, "")


def _lead(measured: pd.DataFrame, words: str, rank: int) -> str:
    """Points ahead of normal training from the same seed, which draws the same network and the same batches."""
    by_seed = measured.pivot_table(index="seed", columns=["method", "rank"], values="accuracy")
    if not rank or (NORMAL, 0) not in by_seed or (words, rank) not in by_seed:
        return ""
    lead = (by_seed[words, rank] - by_seed[NORMAL, 0]).dropna()
    return over_seeds(lead) if len(lead) else ""


def plot(runs: list[Settings], results: Results, file: Path) -> Path:
    """Test error against the inner width, a line for each data set; or against the rate, where there are several."""
    measured = table(runs, results)
    measured = measured.assign(error=100 - measured.accuracy)
    models = list(dict.fromkeys(measured.model))
    figure, axes = panels(1, len(models), width=7.6, height=4.6)
    by_rate = measured.lr.nunique() > 1
    for axis, model in zip(axes[0], models, strict=True):
        (_by_rate if by_rate else _by_width)(axis, measured[measured.model == model])
        _log_errors(axis)
        axis.set_title(", ".join([name(model)] * (len(models) > 1)))
    axes[0][0].set_ylabel("test error after training, %")
    if by_rate:
        legend_below(figure, columns=3)
    narrow, rate = "How narrow can the hidden layer W = B A be?", "Which learning rate suits low-rank layers?"
    headline(figure, rate if by_rate else narrow)
    return save(figure, file)


def _by_width(axis: Axes, measured: pd.DataFrame) -> None:
    """A colour for each data set; normal training as a dashed line and a band of one standard deviation."""
    for at, (data, rows) in enumerate(measured[measured.dataset != AVERAGE].groupby("dataset", sort=False)):
        color, label = COLOURS[at % len(COLOURS)], name(data)
        normal = rows[rows["rank"] == 0].error
        if len(normal):
            axis.axhline(normal.mean(), color=color, linestyle="--", linewidth=1.2)
            axis.axhspan(
                normal.mean() - normal.std(), normal.mean() + normal.std(), color=color, alpha=0.12, linewidth=0
            )
        for kind, (words, series) in enumerate(rows[rows["rank"] > 0].groupby("method", sort=False)):
            by_width = series.groupby("rank").error.agg(["mean", "std"])
            several = rows[rows["rank"] > 0].method.nunique() > 1
            axis.errorbar(
                by_width.index, by_width["mean"], by_width["std"], marker=MARKERS[(at + kind) % len(MARKERS)],
                color=color, capsize=3, label=f"{label}, {words}" if several else label,
            )  # fmt: skip
    axis.plot([], [], "--", color="black", linewidth=1.2, label="dashed: normal training, W itself")
    axis.set_xlabel("inner width of the factors: columns of B")
    plain_ticks(axis, sorted({width for width in measured["rank"] if width}) or [1])
    axis.legend()


def _by_rate(axis: Axes, measured: pd.DataFrame) -> None:
    """A line for each inner width and start."""
    shown = measured[measured.dataset == measured.dataset.iloc[-1]]
    for at, ((rank, start), rows) in enumerate(shown.groupby(["rank", "start"], sort=False)):
        words = f"inner width {rank}, {start} start" if rank else NORMAL
        look = style(at) if rank else {"color": "black", "marker": "."}
        by_rate = rows.groupby("lr").error.mean()
        axis.plot(by_rate.index, by_rate, label=words, **look)
    axis.set_xlabel("learning rate of Adam")
    plain_ticks(axis, sorted(set(shown.lr)))


def _log_errors(axis: Axes) -> None:
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
