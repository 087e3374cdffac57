"""Singular values of the increments that lottery subspaces are made of (Larsen et al. 2021, figures 10 and 11).

    python recipes/lottery/spectra.py recipes/lottery/mnist.yaml [--output <folder>]
    python recipes/lottery/spectra.py recipes/lottery/mnist.yaml --report

From the trajectories that the recipe's runs recorded. A spectrum in the result is kept when its trajectory is deleted.
Beside the spectra, the accuracy at each d, without the running maximum over nested subspaces.
"""

import sys
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.lab import command
from recipes.lab.measurement import Parser, runs_of
from recipes.lab.results import Results, read_measurement, write_measurement
from recipes.reports.compression import method
from recipes.reports.figures import counted, headline, panels, save, sparse, style
from recipes.reports.labels import labels, name
from recipes.reports.records import table as trainings
from recipes.reports.tables import markdown
from recipes.training.settings import Settings
from subspace_peft import Trajectory


METRIC = "final_accuracy"
SHARES = (0.9, 0.99, 0.999)
"""The shares of the sum of squared singular values that the table is about."""


def measure(runs: list[Settings], trajectories: Path) -> list[dict[str, Any]]:
    """The spectrum of each trajectory that gives a basis of the runs and has all samples that they need."""
    samples = {}
    for run in runs:
        samples[run.trajectory] = max(run.samples, samples.get(run.trajectory, 0))
    spectra = []
    for sampled, last in samples.items():
        trajectory = Trajectory(trajectories / sampled.name, increments=True, last=last)
        if last not in trajectory.steps:
            continue
        values = [float(f"{value:.6g}") for value in trajectory.singular_values(center=False).tolist()]
        spectrum = {"trajectory": sampled.name, "model": sampled.model, "seed": sampled.seed, "samples": last}
        spectra.append(spectrum | {"singular_values": values})
    return spectra


def recorded(runs: list[Settings], trajectories: Path, file: Path) -> dict[str, Any]:
    """The spectra of the trajectories of these runs: those of the file, and new ones, which the file gets."""
    record = read_measurement(file) if file.exists() else {"dataset": runs[0].dataset, "spectra": []}
    measured, names = measure(runs, trajectories), {run.trajectory.name for run in runs}
    known = {each["trajectory"]: each for each in [*record["spectra"], *measured] if each["trajectory"] in names}
    record["spectra"] = sorted(known.values(), key=lambda each: (each["model"], each["seed"]))
    if measured:
        write_measurement(file, record)
        record = read_measurement(file)
    return record


def text(record: dict[str, Any]) -> str:
    """How few directions hold how much of the squared increments."""
    rows = []
    for spectrum in record["spectra"]:
        squares = pd.Series(spectrum["singular_values"]) ** 2
        shares = squares.cumsum() / squares.sum()
        needed = [int((shares < share).sum()) + 1 for share in SHARES]
        rows.append([name(spectrum["model"]), spectrum["seed"], f"{spectrum['singular_values'][0]:.3g}", *needed])
    header = ["network", "seed", "σ_1", *(f"directions for {100 * share:g} % of Σ σ²" for share in SHARES)]
    return "\n".join(markdown(header, rows))


def tables() -> dict[str, str]:
    """What the committed results say, for the README."""
    files = sorted(Path(__file__).parent.glob("spectra_*.jsonl"))
    return {file.stem.removeprefix("spectra_"): text(read_measurement(file)) for file in files}


def plot(record: dict[str, Any], runs: list[Settings], results: Results, file: Path) -> Path:
    """A row for each model: the spectrum of each seed; the accuracy at each d, of each seed and the mean."""
    models = list(dict.fromkeys(spectrum["model"] for spectrum in record["spectra"]))
    figure, axes = panels(len(models), 2, width=5.5, height=4.4)
    for (left, right), model in zip(axes, models, strict=True):
        _draw_spectra(left, [spectrum for spectrum in record["spectra"] if spectrum["model"] == model])
        _draw_accuracies(right, [run for run in runs if run.model == model], results)
        left.set(xlabel="direction, by size", ylabel="singular value of the steps of a training")
        left.set_title("How much a training moves along each direction")
        right.set(xlabel="directions trained, d", ylabel="test accuracy after training, %")
        right.set_title("How accurate a training along the first d is")
        for axis in (left, right):
            axis.legend()
    task = f"{' and '.join(map(name, models))} on {name(record['dataset'])}"
    headline(figure, f"How many directions does a training need? {task}")
    return save(figure, file)


def _draw_spectra(axis: Axes, spectra: list[dict[str, Any]]) -> None:
    for at, spectrum in enumerate(spectra):
        values = pd.Series(spectrum["singular_values"]).loc[lambda values: values > 0]
        axis.plot(values.index + 1, values, linewidth=1.2, color=style(at)["color"], label=f"seed {spectrum['seed']}")
    axis.set_yscale("log")
    counted(axis)


def _draw_accuracies(axis: Axes, runs: list[Settings], results: Results) -> None:
    names = labels([run for run in runs if _is_lottery(run)], method)
    for at, label in enumerate(dict.fromkeys(names.values())):
        table = trainings([run for run in runs if names.get(run.name) == label], results)
        if not len(table):
            continue
        for _, line in table.sort_values("d").groupby("seed"):
            axis.plot(line.d, 100 * line[METRIC], color=style(at)["color"], linewidth=0.8, alpha=0.5)
        mean, t = 100 * table.groupby("d")[METRIC].mean(), table.burn_in.iloc[0]
        words = f"from step {t} of full training" if t else "from the start"
        axis.plot(mean.index, mean, label=f"{words}, mean", **style(at))
    full = trainings([run for run in runs if run.projection == "full"], results)
    if len(full):
        axis.axhline(100 * full[METRIC].mean(), color="black", linestyle=":", label="full training")
    counted(axis, sparse(run.d for run in runs if _is_lottery(run)), base=2)


def _is_lottery(run: Settings) -> bool:
    return run.projection == "basis" and run.increments


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("file", type=Path, help="the recipe of the lottery subspaces")
    options = parser.parse_args(arguments)
    output, runs = options.output or options.file.parent, runs_of(options.file, "training")
    lottery = [run for run in runs if _is_lottery(run)]
    if not lottery:
        raise ValueError(f"The recipe must have lottery subspaces, {str(options.file)!r} has none; take another.")
    for dataset in dict.fromkeys(run.dataset for run in lottery):
        name, of_dataset = f"spectra_{dataset}", [run for run in runs if run.dataset == dataset]
        file, sampled = output / f"{name}.jsonl", [run for run in lottery if run.dataset == dataset]
        record = read_measurement(file) if options.report else recorded(sampled, output / "trajectories", file)
        if not record["spectra"]:
            raise ValueError(
                f"{output / 'trajectories'} must hold a trajectory of {options.file} on {dataset}, and holds none; "
                f"record them with recipes/run.py {options.file}."
            )
        print(text(record))
        print(plot(record, of_dataset, Results(output), output / "plots" / f"{name}.png"))


if __name__ == "__main__":
    command.run(main)
