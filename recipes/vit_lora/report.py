"""What the results say: tables, and accuracy against how many numbers are trained."""

import json
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from recipes.lab.results import Results
from recipes.reports.figures import MARKERS, save
from recipes.vit_lora.settings import Settings
from subspace_peft.measure import Dimension, intrinsic_dimension


METHOD = ["label", "rank", "d", "lr", "head_lr"]
"""What tells the rows of the table apart."""
COMMON = ("dataset", "base", "image_size", "images", "validation", "epochs", "batch_size", "warmup", "augment", "bf16")
"""What all rows of a table must share: accuracies of other settings are no spread over seeds."""


def check(runs: list[Settings]) -> None:
    """Raises ValueError if the runs differ in what a table must share."""
    for key in COMMON:
        if len(values := {getattr(run, key) for run in runs}) > 1:
            raise ValueError(f"A table must be of one `{key}`, got {', '.join(map(str, sorted(values)))}; give one.")


def table(runs: list[Settings], results: Results) -> pd.DataFrame:
    """One row for each run that has a result.

    Raises:
        ValueError: if the runs start from different weights, or differ in what a table must share.
    """
    check(runs)
    found = [(run, results.load(run)) for run in runs]
    rows = [
        run.record()
        | {"label": run.label, "accuracy": 100 * result["final_accuracy"], "base_digest": result["base_digest"]}
        | {**result["trainable"], "bytes": result["adapter"]["bytes"], "ms": milliseconds(result)}
        for run, result in found
        if result
    ]
    bases = sorted({f"{row['base']} {row['base_digest']}" for row in rows})
    if len(bases) > 1:
        raise ValueError(f"Results must be of one base, got {', '.join(bases)}; delete those of the others.")
    return pd.DataFrame(rows)


def milliseconds(result: dict) -> float:
    """Of a step: on a CPU its own time, whatever else the machine does."""
    return result["step_ms"]["wall" if result["hardware"]["gpu"] else "cpu"]


def means(runs: pd.DataFrame) -> pd.DataFrame:
    groups = runs.groupby(METHOD, sort=False)
    means = groups[["accuracy", "adapter", "head", "bytes"]].mean()
    return means.assign(sd=groups.accuracy.std(), seeds=groups.seed.nunique(), ms=groups.ms.min()).reset_index()


def curves(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of each method, by how many numbers it trains; methods without a choice of that left out."""
    parts = rows[~rows.label.isin(["full fine-tuning", "head alone"])].groupby("label", sort=False)
    return {label: part.sort_values("adapter") for label, part in parts}


def dimensions(runs: pd.DataFrame) -> dict[str, Dimension]:
    """d_int90 of each of our curves: the first d whose mean accuracy is 90 % of full fine-tuning's."""
    full = runs[runs.label == "full fine-tuning"].accuracy.mean()
    ours = runs[runs.d > 0].drop(columns=["projection", "coordinates"])
    if full != full:
        return {}
    parts = ours.groupby("label", sort=False)
    return {label: intrinsic_dimension(part, baseline=full, metric="accuracy") for label, part in parts}


def costs(output: Path) -> dict[str, dict[str, float]]:
    """What `cost.py` measured, by the name of the run."""
    files = (output / "results").glob("costs_*.json")
    return {row["name"]: row for file in files for row in json.loads(file.read_text())["runs"]}


def text(runs: list[Settings], results: Results) -> str:
    """The table of methods: accuracy with its standard deviation over seeds, and what each costs."""
    names = {tuple(getattr(run, key) for key in METHOD): replace(run, seed=0).name for run in runs}
    runs, measured = table(runs, results), costs(results.output)
    lines = [
        "| method | rank | d | trained, without and with the classifier | accuracy, % | seeds | bytes saved "
        "| ms a step | peak MB |",
        "|" + " --- |" * 9,
    ]
    for row in means(runs).itertuples():
        spread = f" ± {row.sd:.2f}" if row.seeds > 1 else ""
        cost = measured.get(names[tuple(getattr(row, key) for key in METHOD)], {})
        cells = [row.label, row.rank or "", f"{row.d:,}" if row.d else "", f"{row.adapter:,.0f}; "]
        cells[3] += f"{row.adapter + row.head:,.0f}"
        cells += [f"{row.accuracy:.2f}{spread}", row.seeds, f"{row.bytes:,.0f}"]
        cells += [f"{row.ms:.0f}", f"{cost['peak_mb']:.1f}" if cost else ""]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    found = dimensions(runs)
    return "\n".join([*lines, "", *(f"d_int90, {label}: {dimension}" for label, dimension in found.items())])


def plot(runs: list[Settings], results: Results, file: Path) -> Path:
    """Mean accuracy and its standard deviation against trained numbers, d_int90 as a ring around its point."""
    first, runs = runs[0], table(runs, results)
    rows, found = means(runs), dimensions(runs)
    figure, axis = plt.subplots(figsize=(8, 5.4), layout="constrained")
    for at, (label, line) in enumerate(curves(rows).items()):
        style = "--" if label.startswith("low rank") else "-" if label.startswith("weight") else ":"
        marker = MARKERS[at % len(MARKERS)]
        (curve, *_) = axis.errorbar(
            line.adapter, line.accuracy, line.sd.fillna(0), marker=marker, linestyle=style, capsize=2, label=label
        )
        if label in found and found[label].d:
            point = line[line.d == found[label].d]
            colour = curve.get_color()
            axis.plot(point.adapter, point.accuracy, "o", color=colour, markersize=14, fillstyle="none")
    for label, colour, style in (("full fine-tuning", "black", "-"), ("head alone", "grey", "-.")):
        for row in rows[rows.label == label].itertuples():
            text = f"{label}: {row.accuracy:.1f} %, {row.adapter + row.head:,.0f} numbers"
            axis.axhline(row.accuracy, color=colour, linestyle=style, linewidth=1, label=text)
            if label == "full fine-tuning":
                axis.axhline(0.9 * row.accuracy, color="grey", linestyle=":", linewidth=1, label="90 % of it")
    axis.plot([], [], "o", color="black", markersize=14, fillstyle="none", label="d_int90")
    head = f"{rows['head'].max():,.0f}"
    axis.set(xscale="log", xlabel=f"numbers trained beside the {head} of the classifier", ylabel="test accuracy, %")
    axis.set_title(f"{first.base or 'a ViT'} → {first.dataset}")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small", loc="lower right", ncols=2)
    return save(figure, file)
