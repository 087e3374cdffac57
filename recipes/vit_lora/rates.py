"""The report of a search for learning rates: accuracy by rate, for each method."""

from pathlib import Path

import pandas as pd

from recipes.lab.results import Results
from recipes.reports.figures import headline, panels, plain_ticks, save, style
from recipes.reports.tables import by_rate
from recipes.vit_lora.report import HEAD, table
from recipes.vit_lora.report import check as check
from recipes.vit_lora.settings import Settings


KEYS = {"label": "method", "rank": "rank", "d": "d", "head_lr": "rate of the classifier"}


def rates(runs: list[Settings], results: Results) -> pd.DataFrame:
    """A row a run, with its `rate`: for the classifier alone its own, for others that of what is trained beside it."""
    runs = table(runs, results)
    alone = runs.label == HEAD
    return runs.assign(rate=runs.lr.where(~alone, runs.head_lr), head_lr=runs.head_lr.where(~alone, 0))


def text(runs: list[Settings], results: Results) -> str:
    """Accuracy by rate, the best in bold."""
    return "\n".join(by_rate(rates(runs, results), KEYS))


def plot(runs: list[Settings], results: Results, file: Path) -> Path:
    """Accuracy against the rate: PEFT's methods and full fine-tuning on the left, subspaces on the right.

    Lines of several rates alone, where there are any.
    """
    measured = rates(runs, results)
    figure, (axes,) = panels(1, 2, width=5.5, height=5.0, sharey=True)
    for axis, ours, title in ((axes[0], False, "Without a subspace"), (axes[1], True, "θ_d in a subspace")):
        shown = measured[(measured.d > 0) == ours]
        several = shown.groupby(list(KEYS)).rate.transform("nunique") > 1
        shown = shown[several] if several.any() else shown
        for at, ((label, rank, d, head_lr), line) in enumerate(shown.groupby(list(KEYS), sort=False)):
            words = label + f", rank {rank}" * bool(rank) + f", d = {d:,}" * bool(d)
            beside = f", classifier at {head_lr:g}" * bool(head_lr)
            by = line.groupby("rate").accuracy.mean()
            axis.plot(by.index, by, label=words + beside, **style(at))
        axis.set(xlabel="learning rate", title=title)
        plain_ticks(axis, sorted(set(shown.rate)) or [1])
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), frameon=False, fontsize=8.5)
    axes[0].set_ylabel("accuracy on held-out images, %")
    headline(figure, "Which learning rate does each method like?")
    return save(figure, file)
