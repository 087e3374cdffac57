"""The report over many tasks: mean accuracy, and what each method gains on the head alone, task by task."""

from pathlib import Path

import pandas as pd

from recipes.lab.results import Results
from recipes.pretrained.report import LEVELS, check_common, table
from recipes.pretrained.settings import FOUND, METHODS, Settings
from recipes.reports.figures import GREY, count, counted, headline, panels, save, style
from recipes.reports.labels import name
from recipes.reports.tables import joined, markdown, spread


COMMON = ("dataset", "base", "image_size", "measured_examples", "batch_size", "warmup", "seed")
ALL = "norms and biases, all of them"


def check(runs: list[Settings]) -> None:
    check_common(runs, COMMON)
    check_common(compared(runs), ("examples", "epochs"))


def compared(runs: list[Settings]) -> list[Settings]:
    """Those that are trained as long as the runs with a basis; the others are their sources."""
    lengths = {(run.examples, run.epochs) for run in runs if run.projection == "basis"}
    return [run for run in runs if (run.examples, run.epochs) in lengths]


def means(runs: list[Settings], results: Results) -> pd.DataFrame:
    """A row a method and d: mean test accuracy over the tasks that all methods have, and paired differences.

    `gain` is the accuracy less that of the head alone, `gap` that less the accuracy of all norms and biases; `_error`
    their standard errors over the tasks.
    """
    measured = table(compared(runs), results)
    measured = measured.assign(label=measured.label.str.removesuffix(FOUND))
    grid = measured.pivot_table(index="task", columns=["label", "adapter"], values="test").dropna()
    rows = []
    for label, adapter in sorted(grid, key=lambda column: (list(measured.label.unique()).index(column[0]), column[1])):
        accuracy = grid[label, adapter]
        row = {"label": label, "adapter": adapter, "test": accuracy.mean(), "tasks": len(grid)}
        for key, other in {"gain": METHODS["head"], "gap": ALL}.items():
            difference = accuracy - grid[other].iloc[:, 0]
            row |= {key: difference.mean(), f"{key}_error": difference.sem()}
        at = (measured.label == label) & (measured.adapter == adapter)
        rows.append(row | {"bytes": measured[at].bytes.mean()})
    return pd.DataFrame(rows)


def parts(runs: list[Settings], results: Results) -> dict[str, str]:
    """The table "tasks"."""
    rows = means(runs, results)
    lines = [
        [row.label, f"{row.adapter:,}", f"{row.test:.1f}"]
        + ["" if row.label == METHODS["head"] else f"{spread(row.gain, row.gain_error, 1)}"]
        + ["" if row.label == ALL else f"{spread(row.gap, row.gap_error, 1)}", f"{row.bytes:,.0f}"]
        for row in rows.itertuples()
    ]
    header = ["method", "parameters without the head", f"mean test accuracy of {rows.tasks.max()} tasks, %"]
    header += ["gain on the head alone ± standard error", "less all norms and biases", "bytes saved"]
    return {"tasks": "\n".join(markdown(header, lines))}


def text(runs: list[Settings], results: Results) -> str:
    return joined(parts(runs, results))


def plot(runs: list[Settings], results: Results, file: Path) -> Path:
    """The mean gain on the head alone and its standard error, against trained parameters."""
    rows = means(runs, results)
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
