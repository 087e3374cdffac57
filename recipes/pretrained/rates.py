"""The report of a search for learning rates: accuracy on the validation set by rate, for each method."""

from pathlib import Path

import pandas as pd

from recipes.lab.results import Results
from recipes.pretrained.report import check as check
from recipes.pretrained.report import table
from recipes.pretrained.settings import FOUND, METHODS, Settings
from recipes.reports.figures import GREY, headline, panels, plain_ticks, save, style
from recipes.reports.tables import by_rate, joined, markdown


KEYS = {"label": "method", "rank": "rank", "modules": "modules", "d": "d", "head_lr": "rate of the head"}


def rates(runs: list[Settings], results: Results) -> pd.DataFrame:
    """A row a run, with its `rate`: for the head alone its own, for others that of what is trained beside it.

    Rates that were found have 0.
    """
    runs = table(runs, results)
    alone, found = runs.label == METHODS["head"], runs.lr == 0
    return runs.assign(
        modules=runs.modules.str.replace("|", " or "),
        rate=runs.lr.where(~alone, runs.head_lr),
        head_lr=runs.head_lr.where(~(alone | found), 0),
        accuracy=runs.validation,
    )


def sizes(measured: pd.DataFrame) -> pd.DataFrame:
    """A row a d at the rates that were found, between the head alone and full fine-tuning at their best rates.

    `share` is how much of the way between these two it goes, on the test set.
    """
    best = measured.sort_values("validation", kind="stable").groupby("label").last()
    ends = best.loc[[METHODS["head"], METHODS["full"]]].reset_index()
    rows = pd.concat([ends[:1], measured[measured.rate == 0].sort_values("d"), ends[1:]])
    low, high = ends.test
    return rows.assign(share=(rows.test - low) / (high - low))


def parts(runs: list[Settings], results: Results) -> dict[str, str]:
    """The tables "rates": accuracy by rate, the best in bold; and "sizes": accuracy by d."""
    measured = rates(runs, results)
    tables = {"rates": "\n".join(by_rate(measured, KEYS))}
    if {METHODS["head"], METHODS["full"]} <= set(measured.label) and (measured.rate == 0).any():
        rows = [
            [row.label.removesuffix(FOUND), f"{row.adapter:,.0f}", f"{row.validation:.1f}", f"{row.test:.1f}"]
            + [f"{100 * row.share:.0f} %", f"{row.bytes:,.0f}"]
            for row in sizes(measured).itertuples()
        ]
        header = [
            "method",
            "parameters without the head",
            "validation, %",
            "test, %",
            "of the way to full fine-tuning",
        ]
        tables["sizes"] = "\n".join(markdown([*header, "bytes saved"], rows))
    return tables


def text(runs: list[Settings], results: Results) -> str:
    return joined(parts(runs, results))


def plot(runs: list[Settings], results: Results, file: Path) -> Path:
    """Accuracy against the rate, with stars where rates were found."""
    measured = rates(runs, results)
    figure, ((axis,),) = panels(1, 1, width=8, height=5)
    searched = measured[measured.rate > 0].groupby(list(KEYS), sort=False)
    for at, ((label, rank, _, d, _), line) in enumerate(searched):
        words = label + f", rank {rank}" * bool(rank) + f", d = {d:,}" * bool(d)
        by = line.groupby("rate").accuracy.mean()
        axis.plot(by.index, by, label=words, **style(at))
    found = measured[measured.rate == 0]
    if len(found):
        places = [first for first, *_ in found.rates]
        axis.plot(places, found.accuracy, "*", color=GREY, markersize=11, label="rates found")
    plain_ticks(axis, sorted(set(measured.rate) - {0}))
    axis.set(xlabel="learning rate", ylabel="accuracy on the validation set, %")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8.5)
    headline(figure, "Which learning rate does each method like?")
    return save(figure, file)
