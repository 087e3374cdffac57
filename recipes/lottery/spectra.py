"""Singular values of the increments that lottery subspaces are made of (Larsen et al. 2021, figures 10 and 11).

    python recipes/lottery/spectra.py recipes/lottery/mnist.yaml [--output <folder>]

From the trajectories that the recipe's runs recorded; spectra that are in the result already need them no more. Beside
the spectra, the accuracy at each d, without the running maximum over nested subspaces.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.lab import environment
from recipes.lab.grid import read
from recipes.lab.results import Results
from recipes.reports.compression import labels
from recipes.reports.dimension import markdown
from recipes.reports.figures import MARKERS, save
from recipes.reports.records import table as trainings
from recipes.training.settings import Settings
from subspace_peft import Trajectory


METRIC = "final_accuracy"
SHARES = (0.9, 0.99, 0.999)
"""Of the sum of the squared singular values, in the table."""


def measure(runs: list[Settings], trajectories: Path) -> list[dict[str, Any]]:
    """The spectrum of each trajectory that runs have a basis of, as far as its samples are there."""
    samples = {}
    for run in runs:
        samples[run.trajectory] = max(run.samples, samples.get(run.trajectory, 0))
    found = []
    for sampled, last in samples.items():
        trajectory = Trajectory(trajectories / sampled.name, increments=True, last=last)
        if last not in trajectory.steps:
            continue
        values = [float(f"{value:.6g}") for value in trajectory.singular_values(center=False).tolist()]
        spectrum = {"trajectory": sampled.name, "model": sampled.model, "seed": sampled.seed, "samples": last}
        found.append(spectrum | {"singular_values": values})
    return found


def recorded(runs: list[Settings], trajectories: Path, file: Path) -> dict[str, Any]:
    """What the file says of the trajectories of these runs, after those that are there have been written to it."""
    record = json.loads(file.read_text()) if file.exists() else {"dataset": runs[0].dataset, "spectra": []}
    measured, names = measure(runs, trajectories), {run.trajectory.name for run in runs}
    known = {each["trajectory"]: each for each in [*record["spectra"], *measured] if each["trajectory"] in names}
    record["spectra"] = sorted(known.values(), key=lambda each: (each["model"], each["seed"]))
    if measured:
        record |= environment.record()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record) + "\n")
    return record


def text(record: dict[str, Any]) -> str:
    """How few directions hold how much of the squared increments."""
    rows = []
    for spectrum in record["spectra"]:
        squares = pd.Series(spectrum["singular_values"]) ** 2
        shares = squares.cumsum() / squares.sum()
        needed = [int((shares < share).sum()) + 1 for share in SHARES]
        rows.append([spectrum["model"], spectrum["seed"], f"{spectrum['singular_values'][0]:.3g}", *needed])
    header = ["model", "seed", "σ_1", *(f"directions for {100 * share:g} % of Σ σ²" for share in SHARES)]
    return "\n".join(markdown(header, rows))


def plot(record: dict[str, Any], runs: list[Settings], results: Results, file: Path) -> Path:
    """A row for each model: the spectrum of each seed; the accuracy at each d, of each seed and the mean."""
    models = list(dict.fromkeys(spectrum["model"] for spectrum in record["spectra"]))
    size = (12.8, 4.8 * len(models))
    figure, axes = plt.subplots(len(models), 2, figsize=size, squeeze=False, layout="constrained")
    for (left, right), model in zip(axes, models, strict=True):
        _draw_spectra(left, [spectrum for spectrum in record["spectra"] if spectrum["model"] == model])
        _draw_accuracies(right, [run for run in runs if run.model == model], results)
        left.set(xlabel="number of the direction", ylabel="singular value of the increments")
        right.set(xlabel="d", ylabel="test accuracy after the last epoch, %")
        for axis in (left, right):
            axis.set_title(f"{model} on {record['dataset']}")
            axis.grid(alpha=0.3)
            axis.legend(fontsize="small")
    return save(figure, file)


def _draw_spectra(axis: Axes, spectra: list[dict[str, Any]]) -> None:
    for spectrum in spectra:
        values = pd.Series(spectrum["singular_values"]).loc[lambda values: values > 0]
        axis.plot(values.index + 1, values, linewidth=1, label=f"seed {spectrum['seed']}")
    axis.set(xscale="log", yscale="log")


def _draw_accuracies(axis: Axes, runs: list[Settings], results: Results) -> None:
    names = labels(run for run in runs if _is_lottery(run))
    for i, label in enumerate(dict.fromkeys(names.values())):
        table = trainings([run for run in runs if names.get(run.name) == label], results)
        if not len(table):
            continue
        for _, line in table.sort_values("d").groupby("seed"):
            axis.plot(line.d, 100 * line[METRIC], color=f"C{i}", linewidth=0.8, alpha=0.5)
        mean = 100 * table.groupby("d")[METRIC].mean()
        axis.plot(mean.index, mean, color=f"C{i}", marker=MARKERS[i % len(MARKERS)], label=f"{label}, mean")
    full = trainings([run for run in runs if run.projection == "full"], results)
    if len(full):
        axis.axhline(100 * full[METRIC].mean(), color="black", linestyle=":", label="full training")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")


def _is_lottery(run: Settings) -> bool:
    return run.projection == "basis" and run.increments


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the recipe")
    parser.add_argument("--output", type=Path, help="where its results and trajectories are; the recipe's folder")
    options = parser.parse_args(arguments)
    output, runs = options.output or options.file.parent, read(options.file).runs
    for dataset in dict.fromkeys(run.dataset for run in runs if _is_lottery(run)):
        here = [run for run in runs if run.dataset == dataset]
        name = f"spectra_{dataset}"
        lottery = [run for run in here if _is_lottery(run)]
        record = recorded(lottery, output / "trajectories", output / "results" / f"{name}.json")
        if not record["spectra"]:
            sys.exit(
                f"No trajectory of {options.file} on {dataset} is there; record them: recipes/run.py {options.file}."
            )
        print(text(record))
        print(plot(record, here, Results(output), output / "plots" / f"{name}.png"))


if __name__ == "__main__":
    main()
