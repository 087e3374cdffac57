"""What a comparison of optimisers says: accuracy and seconds of each method over seeds, and the course of training.

A method is all settings of a run but its seed; its label names those in which the methods of a sweep differ. A run in
the basis of a trajectory has cost the sampled epochs too.
"""

from collections.abc import Iterable
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from recipes.lab.results import Results
from recipes.reports.dimension import markdown, spread
from recipes.reports.figures import save
from recipes.training.settings import Settings


WORDS = {
    "sgd": "SGD",
    "adam": "Adam",
    "adamw": "AdamW",
    "adam_larsen": "Adam of Larsen et al.",
    "pbfgs": "P-BFGS",
    "pbfgs_paper": "P-BFGS, y of two batches",
    "pplusbfgs": "P⁺-BFGS",
    "pplusbfgs_paper": "P⁺-BFGS, y of two batches",
    "class_gradient": "class gradient, Gram",
    "class_gradient_all": "class gradient, Gram, all examples",
    "class_gradient_poster": "class gradient, poster",
}


def labels(runs: Iterable[Settings]) -> dict[str, str]:
    """By the run's name: its optimiser, and the settings in which the methods with that optimiser differ."""
    runs = list(runs)
    records = {run.name: run.record() for run in runs}
    if sampled := [run.trajectory for run in runs if run.trajectory]:
        names = labels(sampled)
        for run in runs:
            records[run.name]["trajectory"] = run.trajectory and names[run.trajectory.name]
    found = {}
    for name, record in records.items():
        alike = [other for other in records.values() if other["optimizer"] == record["optimizer"]]
        varying = [key for key in record if key != "seed" and any(other[key] != record[key] for other in alike)]
        words = [f"{key.replace('_', ' ')} {record[key]}" for key in varying]
        found[name] = ", ".join([WORDS[record["optimizer"]], *words])
    return found


def courses(runs: list[Settings], results: Results) -> pd.DataFrame:
    """One row for each epoch of each run that has a result.

    `sampling` are the seconds, and `sampled` the accuracy (%), of the trajectory at its last sample.
    """
    names, rows = labels(runs), []
    for run in runs:
        result = results.load(run)
        before = {"sampling": 0.0, "sampled": float("nan")}
        if run.trajectory:
            last = results.load(run.trajectory).get("epochs", [{}] * run.samples)[run.samples - 1]
            before = {"sampling": last.get("seconds", float("nan")), "sampled": 100 * last.get("test_accuracy", 0)}
        for epoch, values in enumerate(result.get("epochs", ()), 1):
            row = {
                "method": names[run.name],
                "seed": run.seed,
                "epoch": epoch,
                "accuracy": 100 * values["test_accuracy"],
            }
            rows.append(row | before | {"loss": values["train_loss"], "seconds": values.get("seconds", float("nan"))})
    return pd.DataFrame(rows)


def by_method(table: pd.DataFrame) -> pd.DataFrame:
    """Over seeds: mean and standard deviation of the final and the best accuracy (%), and mean seconds."""
    runs = table.groupby(["method", "seed"], sort=False).agg(
        epochs=("epoch", "max"),
        final=("accuracy", "last"),
        best=("accuracy", "max"),
        sampled=("sampled", "first"),
        sampling=("sampling", "first"),
        seconds=("seconds", "last"),
    )
    methods = runs.reset_index().groupby("method", sort=False)
    numbers = ["epochs", "final", "best", "sampled", "sampling", "seconds"]
    means, deviations = methods[numbers].mean(), methods[["final", "best"]].std().add_suffix("_sd")
    return methods[["seed"]].nunique().rename(columns={"seed": "seeds"}).join(means).join(deviations).reset_index()


def text(runs: list[Settings], results: Results) -> str:
    """The table as Markdown."""
    header = ["method", "seeds", "epochs", "at the last sample %", "final %", "best %", "s a run", "s with sampling"]
    rows = [
        [
            row.method,
            row.seeds,
            f"{row.epochs:.0f}",
            "" if pd.isna(row.sampled) else f"{row.sampled:.2f}",
            spread(row.final, row.final_sd),
            spread(row.best, row.best_sd),
            f"{row.seconds:.0f}",
            f"{row.seconds + row.sampling:.0f}",
        ]
        for row in by_method(courses(runs, results)).itertuples()
    ]
    return "\n".join(markdown(header, rows))


def plot(runs: list[Settings], results: Results, file: Path) -> Path:
    """Mean test accuracy over the epochs, and over the seconds from the start of sampling."""
    table = courses(runs, results)
    height = 4.8 + 0.1 * table.method.nunique()  # of the curves, and of the legend below them
    figure, axes = plt.subplots(1, 2, figsize=(12.8, height), sharey=True, layout="constrained")
    for method, rows in table.groupby("method", sort=False):
        mean = rows.assign(elapsed=rows.seconds + rows.sampling).groupby("epoch")[["accuracy", "elapsed"]].mean()
        axes[0].plot(mean.index, mean.accuracy, label=method)
        axes[1].plot(mean.elapsed, mean.accuracy, label=method)
    axes[0].set(xlabel="epochs", ylabel="test accuracy, %", ylim=(max(0, table.accuracy.quantile(0.05) - 2), None))
    axes[1].set(xlabel="seconds of training, sampling included")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small")
    return save(figure, file)
