"""The report over many tasks: mean accuracy, and what each method gains on the head alone, task by task."""

from pathlib import Path

import pandas as pd

from recipes.lab.results import Results
from recipes.pretrained import report
from recipes.pretrained.report import LEVELS, table
from recipes.pretrained.settings import FOUND, METHODS, PARAMETERS, WORDS, Settings
from recipes.reports.figures import GREY, count, counted, headline, panels, save, style
from recipes.reports.labels import name
from recipes.reports.tables import check_common, joined, spread, without_empty


ALL = f"{PARAMETERS['vectors']}, {WORDS['identity']}"


def check(runs: list[Settings]) -> None:
    report.check(compared(runs))
    check_common(runs, ("seed",))


def compared(runs: list[Settings]) -> list[Settings]:
    """Those that are trained as long as the runs with a basis, if there are any; the others are their sources."""
    lengths = {(run.examples, run.epochs) for run in runs if run.projection == "basis"}
    return [run for run in runs if not lengths or (run.examples, run.epochs) in lengths]


def means(runs: list[Settings], results: Results) -> pd.DataFrame:
    """A row a method and d: mean test accuracy over the tasks that all methods have, and paired differences.

    `gain` is the accuracy less that of the head alone, `gap` that less the accuracy of all norms and biases; `_error`
    their standard errors over the tasks. Of several rates of the head, the one with the best validation counts.
    """
    measured = table(compared(runs), results)
    if not len(measured):
        return measured
    measured = measured.assign(label=measured.label.str.removesuffix(FOUND))
    kinds = ["label", "adapter"]
    by_rate = measured.groupby([*kinds, "head_lr"], sort=False).validation.mean()
    best = by_rate.groupby(level=kinds, sort=False).idxmax()
    measured = measured.set_index([*kinds, "head_lr"]).loc[list(best)].reset_index()
    grid = measured.pivot_table(index="task", columns=kinds, values="test", sort=False).dropna()
    rows = []
    for label, adapter in grid if len(grid) else ():
        accuracy = grid[label, adapter]
        row = {"label": label, "adapter": adapter, "test": accuracy.mean(), "tasks": len(grid)}
        for key, other in {"gain": METHODS["head"], "gap": ALL}.items():
            there = other != label and other in grid
            difference = accuracy - grid[other].iloc[:, 0] if there else pd.Series(dtype=float)
            row |= {key: difference.mean(), f"{key}_error": difference.sem()}
        at = (measured.label == label) & (measured.adapter == adapter)
        rows.append(row | {"bytes": measured[at].bytes.mean()})
    order = list(dict.fromkeys(measured.label))
    return pd.DataFrame(sorted(rows, key=lambda row: (order.index(row["label"]), row["adapter"])))


def parts(runs: list[Settings], results: Results) -> dict[str, str]:
    """The table "tasks"; empty while no task has all methods."""
    rows = means(runs, results)
    if "tasks" not in rows:
        return {"tasks": ""}
    lines = [
        [row.label, f"{row.adapter:,}", f"{row.test:.1f}"]
        + [
            "" if pd.isna(mean) else spread(mean, error, 1)
            for mean, error in ((row.gain, row.gain_error), (row.gap, row.gap_error))
        ]
        + [f"{row.bytes:,.0f}"]
        for row in rows.itertuples()
    ]
    header = ["method", "parameters without the head", f"mean test accuracy of {rows.tasks.max()} tasks, %"]
    header += ["gain on the head alone ± standard error", "less all norms and biases"]
    return {"tasks": "\n".join(without_empty([*header, "bytes saved, without the basis"], lines))}


def text(runs: list[Settings], results: Results) -> str:
    return joined(parts(runs, results))


def plot(runs: list[Settings], results: Results, file: Path) -> Path:
    """The mean gain on the head alone and its standard error, against trained parameters."""
    rows = means(runs, results)
    rows = rows if "tasks" in rows else pd.DataFrame(columns=["label", "adapter", "gain", "gain_error", "tasks"])
    figure, ((axis,),) = panels(1, 1, width=8, height=5)
    others = rows[~rows.label.isin([*LEVELS, ALL])]
    for at, (label, line) in enumerate(others.groupby("label", sort=False)):
        axis.errorbar(line.adapter, line.gain, line.gain_error, label=label, capsize=3, **style(at))
    for row in rows[rows.label == ALL].itertuples():
        axis.axhline(row.gain, color=GREY, linestyle="--", label=f"{ALL}: {count(row.adapter)} parameters")
    axis.set(xlabel="trained parameters beside the head", ylabel="gain on the head alone, points of test accuracy")
    counted(axis)
    axis.legend(loc="lower right", frameon=False)
    headline(figure, "How few parameters does one more task need?")
    first = compared(runs)[0]
    words = f"{name(first.model)}, {rows.tasks.max()} tasks of {name(first.dataset)}"
    words += f", {count(first.examples)} examples each; mean and standard error over tasks"
    axis.set_title(words, size=10.5, color="#444444")
    return save(figure, file)
