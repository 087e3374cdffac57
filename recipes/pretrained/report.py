"""What the results say: tables, what kronecker loses against fastjl, and accuracy against trained parameters."""

import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import pandas as pd

from recipes.lab.results import Results
from recipes.pretrained.settings import FOUND, METHODS, Settings
from recipes.reports.figures import GREY, MARKERS, count, counted, headline, panels, save, style
from recipes.reports.labels import labels, name
from recipes.reports.tables import check_common, markdown, over_seeds, spread, without_empty


COMMON = ("dataset", "base", "pooling", "length", "image_size", "measured_examples", "examples", "epochs")
COMMON += ("batch_size", "warmup")
"""What all rows of a table must share: accuracies of other settings are no spread over seeds."""
LINE_OF_TEXT = 0.4
"""Points of accuracy that a line of text covers in the figure, about."""
LEVELS = {METHODS["full"]: ("black", "-"), METHODS["head"]: (GREY, "--"), METHODS["none"]: (GREY, ":")}
"""Methods without a size: a line across the figure."""
PAIR = ("weight, kronecker", "weight, fastjl")
"""What is compared seed by seed."""


check = partial(check_common, keys=COMMON)


def point(run: Settings) -> str:
    """The method with its size."""
    size = (f", d = {run.d}" if run.d else "") + (f", rank {run.rank}" if run.rank else "")
    return run.label + size + (f", {run.modules}" if run.modules else "")


def table(runs: list[Settings], results: Results) -> pd.DataFrame:
    """One row for each run that has a result, accuracies in %; `point` is what runs of one mean share.

    Raises:
        ValueError: if the runs start from different weights, or differ in what a table must share.
    """
    check(runs)
    names = labels(runs, point, besides=("seed",))
    rows = [
        run.record()
        | {"point": names[run.name], "label": run.label, "base_digest": result["base_digest"]}
        | {key: 100 * value for key, value in result["accuracy"].items()}
        | {f"{key}_examples": value for key, value in result["examples"].items()}
        | {
            **result["trainable"],
            "bytes": result.get("adapter", {}).get("bytes"),
            "peak": result.get("peak_bytes"),
            "loss": result.get("train_loss", [None])[-1],
            "rates": result.get("rates"),
            "ms": result.get("step_ms", {}).get("wall" if result["hardware"]["gpu"] else "cpu"),
        }
        for run in runs
        if (result := results.load(run))
    ]
    if len(digests := {row["base_digest"] for row in rows}) > 1:
        raise ValueError(f"Results must be of one base, got {', '.join(digests)}; delete those of the others.")
    return pd.DataFrame(rows)


def means(runs: pd.DataFrame) -> pd.DataFrame:
    """A row a point: methods in the order of the recipe, each from few parameters to many."""
    grouped, order = runs.groupby("point", sort=False), list(dict.fromkeys(runs.label))
    rows = grouped[["label", "rank", "modules", "d", "lr", "head_lr"]].first()
    rows = rows.join(grouped[["test", "validation", "adapter", "head", "bytes", "ms", "loss", "peak"]].mean())
    rows = rows.assign(sd=grouped.test.std(), seeds=grouped.seed.nunique(), order=rows.label.map(order.index))
    rows = rows.assign(said=grouped.test.agg(over_seeds), held=grouped.validation.agg(over_seeds))
    return rows.sort_values(["order", "adapter"], kind="stable").reset_index()


def differences(runs: pd.DataFrame, pair: tuple[str, str] = PAIR) -> pd.DataFrame:
    """A row a d, rate and split: the accuracy of the first less that of the second, over the seeds that both have.

    `error` is the standard error of the mean difference over seeds, `sampling` that of one difference between two
    accuracies from this many examples, if the two models erred independently.
    """
    first, second = (runs[runs.label == label].set_index(["d", "lr", "head_lr", "seed"]) for label in pair)
    both = first.index.intersection(second.index)
    rows = []
    for d, lr, head_lr in sorted({index[:3] for index in both}):
        at = [index for index in both if index[:3] == (d, lr, head_lr)]
        for split in ("validation", "test"):
            one, other = first.loc[at, split], second.loc[at, split]
            share = pd.concat([one, other]).mean() / 100
            examples = first.loc[at, f"{split}_examples"].iloc[0]
            each = (one - other).tolist()
            rows.append(
                {"d": d, "lr": lr, "head_lr": head_lr, "split": split, "each": each}
                | {"first": one.mean(), "second": other.mean(), "mean": sum(each) / len(each)}
                | {"error": (one - other).std() / math.sqrt(len(each))}
                | {"sampling": 100 * math.sqrt(2 * share * (1 - share) / examples)}
            )
    return pd.DataFrame(rows)


def parts(runs: list[Settings], results: Results) -> dict[str, str]:
    """The table "methods", and where there is something to compare, "pairs" and "sizes"."""
    measured = table(runs, results)
    rows, paired = means(measured), differences(measured)
    tables = {"methods": "\n".join(_methods(rows))}
    if len(paired):
        tables["pairs"] = "\n".join(_pairs(paired))
    if all((rows.label == METHODS[end]).sum() == 1 for end in ("head", "full")) and (rows.lr == 0).any():
        tables["sizes"] = "\n".join(_sizes(rows))
    return tables


def text(runs: list[Settings], results: Results) -> str:
    """All tables: accuracy with its standard deviation over seeds, and what each method costs."""
    return "\n\n".join(parts(runs, results).values())


def shares(rows: pd.DataFrame) -> pd.DataFrame:
    """Ours at the rates that were found, by d, between the head alone and full fine-tuning.

    `share` is how much of the way between these two the mean test accuracy goes.
    """
    full, head = (rows[rows.label == METHODS[method]] for method in ("full", "head"))
    between = pd.concat([head, rows[rows.lr.eq(0)], full])
    return between.assign(share=(between.test - head.test.item()) / (full.test.item() - head.test.item()))


def _sizes(rows: pd.DataFrame) -> list[str]:
    lines = [
        [row.label.removesuffix(FOUND), f"{row.adapter:,.0f}", row.said, f"{100 * row.share:.0f} %"]
        + [f"{row.bytes:,.0f}", f"{row.ms:.0f}"]
        for row in shares(rows).itertuples()
    ]
    header = ["method", "parameters without the head", "test accuracy, %", "of the way to full fine-tuning"]
    return markdown([*header, "bytes saved", "ms a step"], lines)


def _methods(rows: pd.DataFrame) -> list[str]:
    lines = []
    for row in rows.itertuples():
        rate = f"{row.head_lr if row.label == METHODS['head'] else row.lr:g}" if row.lr else "found"
        costs = ((row.loss, ".3f"), (row.bytes, ",.0f"), (row.ms, ".0f"), (row.peak / 1e6, ".0f"))
        lines.append(
            [row.label, row.rank or "", row.modules.replace("|", " or "), f"{row.adapter:,.0f}", row.said, row.held]
            + [row.seeds, "" if row.label == METHODS["none"] else rate]
            + ["" if math.isnan(value) else format(value, form) for value, form in costs]
        )
    header = ["method", "rank", "modules", "parameters without the head", "test accuracy, %", "validation, %"]
    header += ["seeds", "rate", "last training loss", "bytes saved", "ms a step", "MB beyond the base"]
    return without_empty(header, lines)


def _pairs(rows: pd.DataFrame) -> list[str]:
    """A row a d and split, and one a split for all differences together."""
    first, second = (label.split(", ")[1] for label in PAIR)
    header = ["d", "rate", "accuracy of the", first, second, "difference ± standard error", "by seed"]
    header += ["sampling error of one difference"]
    lines = []
    for row in rows.itertuples():
        by_seed, sampling = ", ".join(f"{each:+.2f}" for each in row.each), f"{row.sampling:.2f}"
        accuracies = [f"{row.first:.2f}", f"{row.second:.2f}", spread(row.mean, row.error)]
        lines.append([f"{row.d:,}", f"{row.lr:g}", f"{row.split} set", *accuracies, by_seed, sampling])
    for split, part in rows.groupby("split", sort=False):
        every, pairs = pd.Series(part.each.sum()), part.each.map(len)
        means = [(part[side] * pairs).sum() / pairs.sum() for side in ("first", "second")]
        accuracies = [*(f"{mean:.2f}" for mean in means), spread(every.mean(), every.sem())]
        lines.append(["all", "", f"{split} set", *accuracies, f"{len(every)} pairs", ""])
    return markdown(header, lines)


def plot(runs: list[Settings], results: Results, file: Path) -> Path:
    """Mean test accuracy and its standard deviation against trained parameters."""
    measured = table(runs, results)
    rows = means(measured)
    figure, ((axis,),) = panels(1, 1, width=8, height=5)
    ours = [(label, line) for label, line in _lines(rows) if label not in METHODS.values()]
    others = [(label, line) for label, line in _lines(rows) if label in METHODS.values()]
    for at, (label, line) in enumerate(ours):
        axis.errorbar(line.adapter, line.test, line.sd.fillna(0), label=label, **style(at), capsize=3)
    before, side = 0.0, 1
    for at, (label, line) in enumerate(sorted(others, key=lambda each: each[1].test.iloc[-1])):
        look = {"color": GREY, "marker": MARKERS[at % len(MARKERS)], "linestyle": ":", "capsize": 3}
        axis.errorbar(line.adapter, line.test, line.sd.fillna(0), **look)
        size, reached = line.adapter.iloc[-1], line.test.iloc[-1]
        side = -side if reached - before < LINE_OF_TEXT else 1
        place = {"xytext": (7 * side, 0), "textcoords": "offset points", "va": "center", "color": GREY}
        axis.annotate(label, (size, reached), ha="left" if side > 0 else "right", **place)
        before = reached
    for label, (color, dash) in LEVELS.items():
        for row in rows[rows.label == label].itertuples():
            axis.axhline(row.test, color=color, linestyle=dash, linewidth=1.4, zorder=1)
            said = f"{label}: {count(row.adapter + row.head)} parameters, {row.test:.1f} %"
            above = 4 if label == METHODS["full"] else -13
            place = {"xycoords": ("axes fraction", "data"), "xytext": (0, above), "textcoords": "offset points"}
            axis.annotate(said, (0.015, row.test), color=color, **place)
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.08 * (high - low))  # room for what is said above the highest line
    axis.set_xlabel(f"trained parameters, beside the {count(rows['head'].max())} of the head")
    axis.set_ylabel("test accuracy, %")
    counted(axis)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="lower right", frameon=False)
    first, seeds = runs[0], measured.seed.nunique()
    headline(figure, "How many trained parameters does a pretrained model need?")
    task = f"{name(first.model)} → {name(first.dataset)}, {count(first.examples)} examples"
    words = f"{task}, {first.epochs} epochs; mean ± standard deviation, {seeds} seeds"
    axis.set_title(words, size=10.5, color="#444444")
    return save(figure, file)


def _lines(rows: pd.DataFrame) -> Iterable[tuple[str, pd.DataFrame]]:
    """The rows of each method that has a size."""
    return rows[~rows.label.isin(LEVELS)].sort_values("adapter").groupby("label", sort=False)
