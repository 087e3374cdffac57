"""What a comparison of optimisers says: accuracy and seconds of each method over seeds, and the course of training.

A method is all settings of a run but its seed; its label names those in which the methods of a sweep differ. A run in
the basis of a trajectory has cost the sampled epochs too. A run whose final accuracy is below twice chance has died:
means over such runs say little, so the table counts them and has the median too, and the figure shows each seed.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.ticker import MaxNLocator

from recipes.lab.results import Results
from recipes.reports.figures import headline, legend_below, panels, plain_ticks, save, style
from recipes.reports.labels import NAMES, distinguishing, flat, labels, name, say
from recipes.reports.tables import by_rate, over_seeds, without_empty
from recipes.tasks.models import CLASSES
from recipes.training.settings import Settings


ALIVE = 2
"""Times chance: the final accuracy from which on a run has learned something."""
RATES = 3
"""Rates of one optimiser from which on the question is which rate it likes."""


def method(run: Settings) -> str:
    return name(run.optimizer)


def courses(runs: list[Settings], results: Results) -> pd.DataFrame:
    """One row for each epoch of each run that has a result.

    `sampling` are the seconds, and `sampled` the accuracy (%), of the trajectory at its last sample.
    """
    names, rows = labels(runs, method, besides=("seed",), task=()), []
    for run in runs:
        result = results.load(run)
        before = {"sampling": 0.0, "sampled": float("nan")}
        if run.trajectory:
            last = results.load(run.trajectory).get("epochs", [{}] * run.samples)[run.samples - 1]
            before = {"sampling": last.get("seconds", float("nan")), "sampled": 100 * last.get("test_accuracy", 0)}
        settings = {key: getattr(run, key) for key in ("dataset", "model", "optimizer", "batch_size", "lr", "seed")}
        settings |= {"method": names[run.name], "chance": 100 / CLASSES[run.dataset]} | before
        for epoch, values in enumerate(result.get("epochs", ()), 1):
            measured = {"epoch": epoch, "accuracy": 100 * values["test_accuracy"], "loss": values["train_loss"]}
            rows.append(settings | measured | {"seconds": values.get("seconds", float("nan"))})
    return pd.DataFrame(rows)


def by_run(table: pd.DataFrame) -> pd.DataFrame:
    """A row a run: its final and best accuracy (%), and whether it has learned."""
    keys = ["dataset", "model", "method", "optimizer", "batch_size", "lr", "seed"]
    runs = table.groupby(keys, sort=False).agg(
        epochs=("epoch", "max"),
        final=("accuracy", "last"),
        best=("accuracy", "max"),
        chance=("chance", "first"),
        sampled=("sampled", "first"),
        sampling=("sampling", "first"),
        seconds=("seconds", "last"),
    )
    return runs.assign(learned=runs.final >= ALIVE * runs.chance).reset_index()


def parts(runs: list[Settings], results: Results) -> dict[str, str]:
    """The table "methods"; or "rates", where the question is which rate an optimiser likes."""
    measured = by_run(courses(runs, results))
    if _is_search(measured):
        return {"rates": "\n".join(_rates(measured))}
    return {"methods": "\n".join(_methods(measured))}


def check(runs: list[Settings]) -> None:
    """Raises ValueError for a search of rates whose runs differ in what its table does not show."""
    if not _is_search(pd.DataFrame([run.record() for run in runs])):
        return
    rows: dict[tuple, list] = {}
    for run in runs:
        rows.setdefault((run.optimizer, run.batch_size), []).append(flat(run.record(), ("seed", "lr", "momentum")))
    for (optimizer, _), records in rows.items():
        if keys := distinguishing(records):
            raise ValueError(
                f"A table of rates needs runs of {optimizer} that differ in `lr`, `batch_size` and `seed` alone, got "
                f"several `{keys[0]}`; leave one."
            )


def text(runs: list[Settings], results: Results) -> str:
    return "\n\n".join(parts(runs, results).values())


def _is_search(measured: pd.DataFrame) -> bool:
    return measured.groupby("optimizer").lr.nunique().max() >= RATES


def _methods(measured: pd.DataFrame) -> list[str]:
    rows, died = [], not measured.learned.all()
    several = measured[~measured.optimizer.str.contains("bfgs")].lr.nunique() > 1
    for (_, _, label), group in measured.groupby(["dataset", "model", "method"], sort=False):
        first = group.iloc[0]
        searched = "bfgs" in first.optimizer  # they look for their step along a line
        sampled = "" if group.sampled.isna().all() else f"{group.sampled.mean():.2f}"
        whole = f"{group.seconds.mean() + group.sampling.mean():.0f}"
        rows.append(
            [label, f"{first.lr:g}" if several and not searched else "", group.seed.nunique()]
            + [f"{group.learned.sum()}" if died else "", f"{group.epochs.mean():.0f}", sampled]
            + [over_seeds(group.final), f"{group.final.median():.2f}" if died else "", over_seeds(group.best)]
            + [f"{group.seconds.mean():.0f}", whole if sampled else ""]
        )
    header = ["method", "rate", "seeds", "seeds that learned", "epochs", "at the last sample %", "final %"]
    return without_empty([*header, "median", "best %", "s a run", "s with sampling"], rows)


def _rates(measured: pd.DataFrame) -> list[str]:
    measured = measured.assign(rate=measured.lr, accuracy=measured.final, method=measured.optimizer.map(name))
    keys = {"method": "final accuracy, %", "batch_size": "batch"}
    return by_rate(measured, keys)


def plot(runs: list[Settings], results: Results, file: Path) -> Path:
    """Test accuracy over epochs and over seconds; a panel each batch size, where an optimiser has several."""
    table = courses(runs, results)
    measured = by_run(table)
    models = " and ".join(map(name, dict.fromkeys(table.model)))
    task = f"{models} on " * (table.model.nunique() == 1) + " and ".join(map(name, dict.fromkeys(table.dataset)))
    if _is_search(measured):
        figure, question = _plot_rates(measured), f"Which rate does each optimiser like? {task}"
    elif len(_batches(measured)) > 1:
        figure, question = _plot_batches(table, measured), f"Which runs learn, and how fast? {task}"
    else:
        figure, question = _plot_courses(table), f"Who learns faster? {task}, mean over seeds"
    headline(figure, question)
    return save(figure, file)


def _batches(measured: pd.DataFrame) -> list[int]:
    """The batch sizes that are compared: all, where an optimiser has several."""
    several = measured.groupby("optimizer").batch_size.nunique().max() > 1
    return sorted(set(measured.batch_size), reverse=True) if several else [0]


def _plot_rates(measured: pd.DataFrame) -> plt.Figure:
    sizes = _batches(measured)
    figure, axes = panels(1, len(sizes), width=11 / max(len(sizes), 2), height=4.6, sharey=True)
    optimizers = sorted(set(measured.optimizer), key=list(NAMES).index)
    for axis, size in zip(axes[0], sizes, strict=True):
        shown = measured[measured.batch_size == size] if size else measured
        for optimizer, group in shown.groupby("optimizer", sort=False):
            means = group.groupby("lr").final.mean()
            axis.plot(means.index, means, label=name(optimizer), **style(optimizers.index(optimizer)))
        axis.axhline(shown.chance.iloc[0], color="black", linestyle=":", linewidth=1, label="chance: the run has died")
        axis.set(xlabel="learning rate", title=say("batch_size", size) if size else "")
        plain_ticks(axis, sorted(set(shown.lr)))
    axes[0][0].set_ylabel("test accuracy after training, %")
    legend_below(figure, columns=3)
    return figure


def _plot_batches(table: pd.DataFrame, measured: pd.DataFrame) -> plt.Figure:
    """Thin each seed, bold the median of those that learned."""
    sizes, optimizers = _batches(measured), sorted(set(table.optimizer), key=list(NAMES).index)
    figure, axes = panels(1, len(sizes), width=11 / len(sizes), height=5.0, sharey=True)
    for axis, size in zip(axes[0], sizes, strict=True):
        for optimizer, group in table[table.batch_size == size].groupby("optimizer", sort=False):
            ended = measured[(measured.batch_size == size) & (measured.optimizer == optimizer)]
            color = style(optimizers.index(optimizer))["color"]
            for _, course in group.groupby(["method", "seed"]):
                axis.plot(course.epoch, course.accuracy, color=color, linewidth=0.7, alpha=0.45)
            learned = group[group.seed.isin(ended[ended.learned].seed)].groupby("epoch").accuracy.median()
            words = f"{name(optimizer)}: {ended.learned.sum()} of {len(ended)} learn"
            axis.plot(learned.index, learned, color=color, linewidth=2.4, label=words)
        axis.set(xlabel="epochs", title=f"{say('batch_size', size)}; bold: median of the runs that learn")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False)
    axes[0][0].set_ylabel("test accuracy, %")
    return figure


def _plot_courses(table: pd.DataFrame) -> plt.Figure:
    figure, axes = panels(1, 2, width=5.5, height=4.4, sharey=True)
    for at, (label, group) in enumerate(table.groupby("method", sort=False)):
        elapsed = group.assign(elapsed=group.seconds + group.sampling).groupby("epoch")
        mean, color = elapsed[["accuracy", "elapsed"]].mean(), style(at)["color"]
        axes[0][0].plot(mean.index, mean.accuracy, label=label, color=color)
        axes[0][1].plot(mean.elapsed, mean.accuracy, label=label, color=color)
    low = max(0, table.accuracy.quantile(0.05) - 2)
    axes[0][0].set(xlabel="epochs", ylabel="test accuracy, %", ylim=(low, None))
    axes[0][0].xaxis.set_major_locator(MaxNLocator(integer=True))
    before = ", with those of the sampled trajectory" if (table.sampling > 0).any() else ""
    axes[0][1].set_xlabel(f"seconds of training{before}")
    legend_below(figure, columns=3 if table.method.nunique() <= 3 else 2)
    return figure
