"""What the results say: tables, and accuracy against how many parameters are trained."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes

from recipes.lab.results import Results, read_measurement
from recipes.reports.dimension import dimension
from recipes.reports.figures import COLOURS, GREY, count, counted, headline, panels, save
from recipes.reports.labels import labels, name
from recipes.reports.tables import check_common, over_seeds, without_empty
from recipes.vit_lora.settings import Settings
from subspace_peft.measure import Dimension, intrinsic_dimension


COMMON = ("dataset", "base", "image_size", "images", "validation", "epochs", "batch_size", "warmup", "augment", "bf16")
"""What all rows of a table must share: accuracies of other settings are no spread over seeds."""
FULL, HEAD = "full fine-tuning", "head alone"
WEIGHT, LOW_RANK = COLOURS[0], "#3C9AD4"
PEFT = {"LoRA": (COLOURS[1], "o"), "AdaLoRA": (COLOURS[3], "D")}
PROJECTIONS = {"sparse": "^", "fastjl": "s", "fastfood": "o"}
Measured = dict[str, dict[str, float]]


check = partial(check_common, keys=COMMON)


def point(run: Settings) -> str:
    """The method with its size."""
    return run.label + (f", rank {run.rank}" if run.rank else "") + (f", d = {run.d}" if run.d else "")


def table(runs: list[Settings], results: Results) -> pd.DataFrame:
    """One row for each run that has a result; `point` is what runs of one mean share.

    Raises:
        ValueError: if the runs start from different weights, or differ in what a table must share.
    """
    check(runs)
    names = labels(runs, point, besides=("seed",))
    rows = [
        run.record()
        | {"point": names[run.name], "label": run.label, "cost": replace(run, seed=0).name}
        | {"accuracy": 100 * result["final_accuracy"], "base_digest": result["base_digest"]}
        | {**result["trainable"], "bytes": result["adapter"]["bytes"], "ms": milliseconds(result)}
        for run in runs
        if (result := results.load(run))
    ]
    bases = sorted({f"{row['base']} {row['base_digest']}" for row in rows})
    if len(bases) > 1:
        raise ValueError(f"Results must be of one base, got {', '.join(bases)}; delete those of the others.")
    return pd.DataFrame(rows)


def milliseconds(result: dict) -> float:
    """The time of a step: on a CPU its own time, whatever else the machine does."""
    return result["step_ms"]["wall" if result["hardware"]["gpu"] else "cpu"]


def means(runs: pd.DataFrame) -> pd.DataFrame:
    """A row a point: methods in the order of the recipe, each from few parameters to many."""
    groups, order = runs.groupby("point", sort=False), list(dict.fromkeys(runs.label))
    same = groups[["label", "projection", "coordinates", "rank", "d", "cost"]].first()
    same = same.join(groups[["accuracy", "adapter", "head", "bytes"]].mean())
    measured = {"sd": groups.accuracy.std(), "said": groups.accuracy.agg(over_seeds), "seeds": groups.seed.nunique()}
    rows = same.assign(**measured, ms=groups.ms.min(), order=same.label.map(order.index))
    return rows.sort_values(["order", "adapter"], kind="stable").reset_index()


def curves(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of each method, by how many parameters it trains; methods without a choice of that left out."""
    parts = rows[~rows.label.isin([FULL, HEAD])].groupby("label", sort=False)
    return {label: part.sort_values("adapter") for label, part in parts}


def dimensions(runs: pd.DataFrame) -> dict[str, Dimension]:
    """d_int90 of each of our curves: the first d whose mean accuracy is 90 % of full fine-tuning's."""
    runs = runs.assign(accuracy=runs.accuracy / 100)
    full = runs[runs.label == FULL].accuracy
    ours = runs[runs.d > 0].drop(columns=["projection", "coordinates"])
    parts = ours.groupby("label", sort=False) if len(full) else ()
    return {label: intrinsic_dimension(part, baseline=full.mean(), metric="accuracy") for label, part in parts}


def costs(output: Path) -> Measured:
    """What `cost.py` measured, by the name of the run."""
    files = sorted(output.glob("costs_*.jsonl"))
    return {row["name"]: row for file in files for row in read_measurement(file)["runs"]}


def parts(runs: list[Settings], results: Results) -> dict[str, str]:
    """The tables "methods" and "d_int90"."""
    measured = table(runs, results)
    sentences = [f"- d_int90, {label}: {dimension(each)}" for label, each in dimensions(measured).items()]
    tables = {"methods": "\n".join(_methods(measured, costs(results.output)))}
    return tables | ({"d_int90": "\n".join(sentences)} if sentences else {})


def text(runs: list[Settings], results: Results) -> str:
    """The table of methods: accuracy with its standard deviation over seeds, and what each costs."""
    return "\n\n".join(parts(runs, results).values())


def _methods(measured: pd.DataFrame, cost: Measured) -> list[str]:
    rows = []
    for row in means(measured).itertuples():
        peak = cost.get(row.cost, {}).get("peak_mb")
        trained = f"{row.adapter:,.0f}; {row.adapter + row.head:,.0f}"
        cells = [row.label, row.rank or "", f"{row.d:,}" if row.d else "", trained, row.said, row.seeds]
        rows.append([*cells, f"{row.bytes:,.0f}", f"{row.ms:.0f}", f"{peak:.1f}" if peak else ""])
    header = ["method", "rank", "d", "parameters trained, without and with the classifier", "accuracy, %", "seeds"]
    return without_empty([*header, "bytes saved", "ms a step", "peak MB"], rows, keep=3)


def plot(runs: list[Settings], results: Results, file: Path) -> Path:
    """Mean accuracy and its standard deviation against trained parameters."""
    first, measured = runs[0], table(runs, results)
    rows = means(measured)
    figure, ((axis,),) = panels(1, 1, width=8, height=5)
    lines = curves(rows)
    for label, line in lines.items():
        (_draw_peft if label in PEFT else _draw_ours)(axis, label, line)
    _draw_levels(axis, rows)
    _name_ours(axis, lines)
    _compare(axis, lines)
    axis.set_xlabel(f"trained parameters, beside the {count(rows['head'].max())} of the classifier")
    axis.set_ylabel("test accuracy, %")
    counted(axis)
    headline(figure, "How many trained parameters does fine-tuning need?")
    task = f"a ViT, {name(first.base)} → {name(first.dataset)}" if first.base else f"a ViT, {name(first.dataset)}"
    images = f", {count(first.images)} images" if first.images else ""
    seeds = f"mean and standard deviation of {measured.seed.nunique()} seeds"
    axis.set_title(f"{task}{images}, {first.epochs} epochs; {seeds}", size=10.5, color="#444444")
    return save(figure, file)


def _draw_peft(axis: Axes, label: str, line: pd.DataFrame) -> None:
    """One of PEFT's methods, its ranks beside the points."""
    color, marker = PEFT[label]
    look = {"color": color, "marker": marker, "markersize": 8, "linestyle": ":", "linewidth": 2, "capsize": 3}
    axis.errorbar(line.adapter, line.accuracy, line.sd.fillna(0), **look)
    for at, row in enumerate(line.itertuples()):
        last = at == len(line) - 1
        words = f"{label}, rank {row.rank}" if last else f"rank {row.rank}"
        place = {"xytext": (7, -15) if last else (0, -22), "ha": "left" if last else "center"}
        place |= {"textcoords": "offset points", "weight": "bold" if last else "normal"}
        axis.annotate(words, (row.adapter, row.accuracy), color=color, **place)


def _draw_ours(axis: Axes, label: str, line: pd.DataFrame) -> None:
    """Bold in weight coordinates, a marker for each projection."""
    first, weight = line.iloc[0], line.coordinates.iloc[0] == "weight"
    look = {"marker": PROJECTIONS.get(first.projection, "v"), "capsize": 2, "elinewidth": 1}
    if weight:
        look |= {"color": WEIGHT, "linewidth": 2.4, "markersize": 7, "zorder": 3, "label": name(first.projection)}
    else:
        look |= {"color": LOW_RANK, "linewidth": 1.3, "markersize": 5, "linestyle": "--"}
    axis.errorbar(line.adapter, line.accuracy, line.sd.fillna(0), **look)


def _draw_levels(axis: Axes, rows: pd.DataFrame) -> None:
    """Full fine-tuning and the classifier alone, which have no size to choose."""
    for label, color, dash, words in ((FULL, "black", "-", FULL), (HEAD, GREY, "--", "classifier alone")):
        for row in rows[rows.label == label].itertuples():
            axis.axhline(row.accuracy, color=color, linestyle=dash, linewidth=1.4, zorder=1)
            said = f"{words}: {count(row.adapter + row.head)} parameters, {row.accuracy:.1f} %"
            place = {"xycoords": ("axes fraction", "data"), "xytext": (0, 4), "textcoords": "offset points"}
            axis.annotate(said, (0.015, row.accuracy), color=color, **place)


def _name_ours(axis: Axes, lines: dict[str, pd.DataFrame]) -> None:
    """The two kinds of coordinates beside their curves, and a legend of the projections."""
    for coordinates, words, color, weight in (
        ("weight", "subspace of the weights\n(ours)", WEIGHT, "bold"),
        ("low_rank", "subspace of LoRA's factors\n(ours)", LOW_RANK, "normal"),
    ):
        members = [line for line in lines.values() if line.coordinates.iloc[0] == coordinates and line.d.max() > 0]
        if members:
            places = pd.concat(members).groupby("adapter").accuracy.agg(["min", "max"])
            above = coordinates == "weight"
            at = places.index[len(places) // 2 if above else min(1, len(places) - 1)]
            axis.annotate(
                words, (at, places.loc[at, "max" if above else "min"]), xytext=(-12, 8) if above else (10, -12),
                textcoords="offset points", ha="right" if above else "left", va="bottom" if above else "top",
                color=color, weight=weight, size=11,
            )  # fmt: skip
    if axis.get_legend_handles_labels()[0]:
        place = {"loc": "lower right", "bbox_to_anchor": (1, 0.1)}
        axis.legend(title="projection P", ncols=3, frameon=False, columnspacing=1.2, handlelength=1.4, **place)


def _compare(axis: Axes, lines: dict[str, pd.DataFrame]) -> None:
    """An arrow from the smallest LoRA to the smallest d at which all our curves of the weights are as accurate."""
    ours = [line for line in lines.values() if line.coordinates.iloc[0] == "weight" and line.d.max() > 0]
    if "LoRA" not in lines or not ours:
        return
    smallest = lines["LoRA"].iloc[0]
    equal = pd.concat(ours).groupby("d").accuracy.min()
    equal = equal[(equal >= smallest.accuracy) & (equal.index < smallest.adapter)]
    if len(equal):
        d, height = equal.index[0], smallest.accuracy
        axis.annotate("", (d * 1.12, height), (smallest.adapter * 0.88, height), arrowprops={"arrowstyle": "->"})
        words = f"{smallest.adapter / d:.1f} times fewer"
        place = {"xytext": (-8, -14), "textcoords": "offset points", "ha": "center"}
        axis.annotate(words, ((d * smallest.adapter) ** 0.5, height), **place)
