"""How much of a trajectory a few components hold: variance ratios, and the accuracy of reconstructed weights.

    python recipes/dldr/reconstruction.py recipes/dldr/lenet5.yaml [--d 5] [--data <folder>] [--output <folder>]
    python recipes/dldr/reconstruction.py recipes/dldr/lenet5.yaml --report

Li et al. 2021, section 3.3 and figure 2: the weights after epoch i become w_0 + P P^T (w_i - w_0), with P the first d
principal components of the trajectory. Needs the trajectories that recipes/run.py records with `save_trajectory: true`
in the same output folder.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.lab import command
from recipes.lab.measurement import Parser, at_least, measured, runs_of
from recipes.lab.results import read_measurement
from recipes.reports.figures import COLOURS, headline, panels, save
from recipes.reports.tables import markdown, over_seeds
from recipes.tasks.data import Split, load
from recipes.tasks.models import build
from recipes.training.settings import Settings
from recipes.training.train import predict
from subspace_peft import Trajectory, coefficients, reconstruct


PUBLISHED = [86.39, 6.94, 3.54, 1.10]
"""Li et al. 2021: % of the variance in each of the first four components, LeNet-5 on MNIST."""


@torch.no_grad()
def measure(run: Settings, folder: Path, d: int, test: Split) -> dict[str, Any]:
    """Variance ratios, and at each sample the accuracies of the weights and of their reconstruction."""
    trajectory = Trajectory(folder)
    origin, basis = trajectory.sample(0), trajectory.basis(d)
    network = build(run.model, run.dataset, run.seed)
    accuracies = {"sampled": [], "reconstructed": []}
    for i in tqdm(range(len(trajectory)), desc=str(run), unit="sample"):
        weights = trajectory.sample(i)
        reconstructed = weights | reconstruct(basis, coefficients(basis, weights, origin), origin)
        for kind, tensors in (("sampled", weights), ("reconstructed", reconstructed)):
            network.load_state_dict(tensors)
            accuracies[kind].append((predict(network, test).argmax(1) == test.labels).double().mean().item())
    return {
        "seed": run.seed,
        "explained_variance_ratio": trajectory.explained_variance_ratio[:10].tolist(),
        "accuracy": accuracies,
    }


def text(results: list[dict[str, Any]], d: int) -> str:
    ratios = 100 * np.array([result["explained_variance_ratio"][:5] for result in results])
    accuracy = {
        kind: 100 * np.array([result["accuracy"][kind] for result in results]) for kind in ("sampled", "reconstructed")
    }
    difference = accuracy["reconstructed"] - accuracy["sampled"]
    published = dict(enumerate(PUBLISHED))
    rows = [[k + 1, published.get(k, ""), over_seeds(ratio)] for k, ratio in enumerate(ratios.T)]
    rows.append([f"1 to {len(PUBLISHED)}", "98", over_seeds(ratios[:, : len(PUBLISHED)].sum(1))])
    lines = markdown(["component", "published, %", "here, % of the variance"], rows)
    last = {kind: over_seeds(values[:, -1]) for kind, values in accuracy.items()}
    lines += ["", f"Accuracy at the last sample: {last['sampled']} %; from {d} components {last['reconstructed']} %."]
    if difference.shape[1] > 10:
        lines += [f"Largest loss at a sample from epoch 10 on: {-difference[:, 10:].min():.2f} points."]
    return "\n".join(lines)


def tables() -> dict[str, str]:
    """What the committed results say, for the README."""
    files = sorted(Path(__file__).parent.glob("*.reconstruction.jsonl"))
    records = {file.stem: read_measurement(file) for file in files}
    return {name.removesuffix(".reconstruction"): text(each["runs"], each["d"]) for name, each in records.items()}


def _test(run: Settings, source: str) -> Split:
    """The test images, standardized if those of the run were."""
    test = load(run.dataset, source, "test")
    if not run.standardize:
        return test
    training = load(run.dataset, source, "train")
    return test.standardized(training.first(run.images) if run.images else training)


def plot(results: list[dict[str, Any]], d: int, file: Path) -> Path:
    """Figure 2 of the paper: the ratios, and both accuracies along the trajectory, over all seeds."""
    figure, (axes,) = panels(1, 2, width=5.5, height=4.2)
    ratios = 100 * np.array([result["explained_variance_ratio"] for result in results])
    components = np.arange(1, ratios.shape[1] + 1)
    axes[0].bar(components, ratios.mean(0), yerr=ratios.std(0), color=COLOURS[0], label="here, mean over seeds")
    axes[0].plot(components[: len(PUBLISHED)], PUBLISHED, "kx", markersize=8, label="Li et al. 2021")
    axes[0].set(xlabel="principal component", ylabel="share of the variance, %", yscale="log", xticks=components)
    axes[0].set_title("Variance of the trajectory, by component")
    kinds = {"sampled": "the weights themselves", "reconstructed": f"given back by {d} components"}
    for (kind, words), color, dash in zip(kinds.items(), COLOURS, ("-", "--"), strict=False):
        values = 100 * np.array([result["accuracy"][kind] for result in results])
        axes[1].plot(values.mean(0), dash, color=color, label=words)
        between = values.min(0), values.max(0)
        axes[1].fill_between(range(values.shape[1]), *between, color=color, alpha=0.15, linewidth=0)
    axes[1].set(xlabel="epoch", ylabel="test accuracy, %", ylim=(90, 100))
    axes[1].set_title("Accuracy of its weights, and of what few components give back")
    for axis in axes:
        axis.legend()
    headline(figure, "How many dimensions has a training trajectory?")
    return save(figure, file)


def measure_all(file: Path, runs: list[Settings], options: argparse.Namespace, output: Path) -> dict[str, Any]:
    """The full trainings of a YAML whose trajectories are there.

    Raises:
        ValueError: if there are none.
    """
    results = []
    for run in runs:
        folder = output / "trajectories" / run.name
        if run.projection == "full" and len(Trajectory(folder)):
            results.append(measure(run, folder, options.d, _test(run, options.data)))
    if not results:
        raise ValueError(
            f"{output / 'trajectories'} must hold a trajectory of {file}, and holds none; record them with "
            f"recipes/run.py {file} --save_trajectory true."
        )
    return {"d": options.d, "runs": results}


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("file", type=Path, help="the recipe, whose runs have recorded trajectories")
    parser.add_argument("--d", type=at_least(1), default=5, help="number of components")
    parser.add_argument("--data", default="", help="a folder of parquet files, or another Hub id")
    options = parser.parse_args(arguments)
    file, output, runs = options.file, options.output or options.file.parent, runs_of(options.file, "training")
    name = f"{file.stem}.reconstruction"
    record = measured(output / f"{name}.jsonl", options.report, lambda: measure_all(file, runs, options, output))
    print(text(record["runs"], record["d"]))
    print(plot(record["runs"], record["d"], output / "plots" / f"{name}.png"))


if __name__ == "__main__":
    command.run(main)
