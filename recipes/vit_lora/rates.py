"""The report of a search for learning rates: accuracy by rate, for each method."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from recipes.lab.results import Results
from recipes.reports.figures import MARKERS, save
from recipes.vit_lora.report import check as check
from recipes.vit_lora.report import table
from recipes.vit_lora.settings import Settings


def text(runs: list[Settings], results: Results) -> str:
    """The table of a search for learning rates: accuracy by rate, the best in bold."""
    runs = table(runs, results)
    alone = runs.label == "head alone"  # its only rate is the classifier's
    runs = runs.assign(rate=runs.lr.where(~alone, runs.head_lr), head_lr=runs.head_lr.where(~alone, 0))
    grid = runs.pivot_table(index=["label", "rank", "d", "head_lr"], columns="rate", values="accuracy", sort=False)
    grid = grid[sorted(grid)]
    lines = ["| method | rank | d | rate of the classifier | " + " | ".join(f"{rate:g}" for rate in grid) + " |"]
    lines.append("|" + " --- |" * (4 + len(grid.columns)))
    for (label, rank, d, head_lr), row in grid.iterrows():
        cells = ["" if pd.isna(v) else f"**{v:.1f}**" if v == row.max() else f"{v:.1f}" for v in row]
        beside = f"{head_lr:g}" if head_lr else ""
        lines.append(f"| {label} | {rank or ''} | {d or ''} | {beside} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(runs: list[Settings], results: Results, file: Path) -> Path:
    """Accuracy against the rate, a line for each method."""
    runs = table(runs, results)
    alone = runs.label == "head alone"
    runs = runs.assign(rate=runs.lr.where(~alone, runs.head_lr), head_lr=runs.head_lr.where(~alone, 0))
    figure, axis = plt.subplots(figsize=(8, 5.4), layout="constrained")
    lines = runs.groupby(["label", "rank", "d", "head_lr"], sort=False)
    for at, ((label, rank, d, head_lr), line) in enumerate(lines):
        means = line.groupby("rate").accuracy.mean()
        size = (
            f", rank {rank}" * bool(rank) + f", d = {d:,}" * bool(d) + f", classifier at {head_lr:g}" * bool(head_lr)
        )
        axis.plot(means.index, means, marker=MARKERS[at % len(MARKERS)], label=label + size)
    axis.set(xscale="log", xlabel="learning rate", ylabel="accuracy on held-out training images, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="x-small", loc="best", ncols=2)
    return save(figure, file)
