"""The report of a search for learning rates: accuracy on the validation set by rate, for each method."""

from pathlib import Path

import pandas as pd

from recipes.lab.results import Results
from recipes.pretrained.report import check as check
from recipes.pretrained.report import table
from recipes.pretrained.settings import METHODS, Settings
from recipes.reports.figures import GREY, headline, panels, plain_ticks, save, style
from recipes.reports.tables import by_rate, joined


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


def parts(runs: list[Settings], results: Results) -> dict[str, str]:
    """The table "rates": accuracy by rate, the best in bold."""
    return {"rates": "\n".join(by_rate(rates(runs, results), KEYS))}


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
