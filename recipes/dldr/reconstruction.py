"""How much of a trajectory a few components hold: variance ratios, and the accuracy of the weights they give back.

    python recipes/dldr/reconstruction.py recipes/dldr/lenet5.yaml [--d 5] [--data <folder>] [--output <folder>]

Li et al. 2021, section 3.3 and figure 2: the weights after epoch i are P P^T (w_i - w_0) + w_0, with P the first d
principal components of the trajectory. Wants the trajectories that recipes/run.py records, `save_trajectory: true`.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.lab import environment
from recipes.lab.grid import read
from recipes.reports.dimension import spread
from recipes.reports.figures import save
from recipes.tasks.data import Split, load
from recipes.tasks.models import build
from recipes.training.settings import Settings
from recipes.training.train import predict
from subspace_peft import Trajectory, coefficients, reconstruct


PUBLISHED = [86.39, 6.94, 3.54, 1.10]
"""% of the variance in the first four components, LeNet-5 on MNIST."""


def measure(run: Settings, folder: Path, d: int, test: Split) -> dict[str, Any]:
    """Variance ratios, and the accuracy at each sample of the weights and of what d components give back."""
    trajectory = Trajectory(folder)
    origin, basis = trajectory.sample(0), trajectory.basis(d)
    network = build(run.model, run.dataset, run.seed)
    accuracies = {"sampled": [], "reconstructed": []}
    for i in tqdm(range(len(trajectory)), desc=str(run), unit="sample"):
        weights = trajectory.sample(i)
        back = reconstruct(basis, coefficients(basis, weights, origin), origin)
        for kind, tensors in (("sampled", weights), ("reconstructed", back)):
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
    lines = ["| component | published % | ours % (mean ± sd over seeds) |", "| --- | --- | --- |"]
    for k, ratio in enumerate(ratios.T):
        published = PUBLISHED[k] if k < len(PUBLISHED) else ""
        lines.append(f"| {k + 1} | {published} | {_spread(ratio)} |")
    last = {kind: _spread(values[:, -1]) for kind, values in accuracy.items()}
    lines += ["", f"Accuracy at the last sample: {last['sampled']} %; from {d} components {last['reconstructed']} %."]
    if difference.shape[1] > 10:
        lines += [f"Largest loss at a sample from epoch 10 on: {-difference[:, 10:].min():.2f} points."]
    return "\n".join(lines)


def _spread(values: np.ndarray) -> str:
    return spread(values.mean(), values.std(ddof=1) if len(values) > 1 else float("nan"))


def _test(run: Settings, source: str) -> Split:
    """The test images as the run saw them."""
    test = load(run.dataset, source, "test")
    if not run.standardize:
        return test
    training = load(run.dataset, source, "train")
    return test.standardized(training.first(run.images) if run.images else training)


def plot(results: list[dict[str, Any]], d: int, file: Path) -> Path:
    """Figure 2 of the paper: the ratios, and both accuracies along the trajectory, over all seeds."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.8, 4.8), layout="constrained")
    ratios = 100 * np.array([result["explained_variance_ratio"] for result in results])
    components = np.arange(1, ratios.shape[1] + 1)
    left.bar(components, ratios.mean(0), yerr=ratios.std(0), label="ours")
    left.plot(components[: len(PUBLISHED)], PUBLISHED, "kx", label="Li et al. 2021")
    left.set(xlabel="component", ylabel="variance, %", yscale="log", xticks=components)
    for kind, style in (("sampled", "-"), ("reconstructed", "--")):
        values = 100 * np.array([result["accuracy"][kind] for result in results])
        label = kind if kind == "sampled" else f"from {d} components"
        right.plot(values.mean(0), style, label=label)
        right.fill_between(range(values.shape[1]), values.min(0), values.max(0), alpha=0.15)
    right.set(xlabel="sample (epoch)", ylabel="test accuracy, %", ylim=(90, 100))
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend()
    return save(figure, file)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the recipe")
    parser.add_argument("--d", type=int, default=5)
    parser.add_argument("--data", default="", help="a folder of parquet files, or another Hub id")
    parser.add_argument(
        "--output", type=Path, help="where the trajectories are and the results go; the recipe's folder"
    )
    options = parser.parse_args(arguments)
    output = options.output or options.file.parent
    results = []
    for run in read(options.file).runs:
        folder = output / "trajectories" / run.name
        if run.projection == "full" and len(Trajectory(folder)):
            results.append(measure(run, folder, options.d, _test(run, options.data)))
    if not results:
        raise ValueError(
            f"{output / 'trajectories'} must hold a trajectory of {options.file}, and holds none; record them with "
            f"recipes/run.py {options.file} --save_trajectory true."
        )
    file = output / "results" / f"{options.file.stem}.reconstruction.json"
    environment.write(file, {"d": options.d, "runs": results})
    print(text(results, options.d))
    print(plot(results, options.d, output / "plots" / f"{options.file.stem}.reconstruction.png"))


if __name__ == "__main__":
    with torch.no_grad():
        main()
