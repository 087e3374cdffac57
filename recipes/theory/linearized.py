"""The threshold training dimension of a network and of its linearisation at an optimum (Larsen et al. 2021, figure 9).

    python recipes/theory/linearized.py [--data <folder>/{dataset}] [--d 4 8 ...] [--seed 0 1 ...] [--output <folder>]
    python recipes/theory/linearized.py --report

Adam trains Conv-2 from w_0 to an optimum. Then, from w_0 again, theta_d is trained in the network and in its
linearisation at that optimum, with the same P and the same batches for the same d and seed. The two-dimensional cut of
the test loss goes through w_0, this optimum and another one, reached with other batches. A run that has a result is
not made again.
"""

import argparse
import copy
import itertools
import math
import sys
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.lab import command
from recipes.lab.measurement import Parser, at_least
from recipes.lab.results import read_measurement, write_measurement
from recipes.reports.figures import COLOURS, counted, headline, panels, save, sparse
from recipes.reports.labels import name
from recipes.reports.tables import joined, markdown, over_seeds
from recipes.tasks.data import Split, batches, load
from recipes.tasks.models import SHAPES, build, check
from subspace_peft import SubspaceConfig
from subspace_peft.landscape import linearized
from subspace_peft.measure import threshold_dimension


NETWORKS = ("full", "linearized")
WORDS = {"full": "the network", "linearized": "its linearisation"}
KEYS = ("dataset", "network", "d", "seed")
BATCH, LR = 128, 0.05  # of theta_d, by Adam, as in the paper
OPTIMUM_LR = 3e-3
DELTA = 0.2  # at most one run of five may miss the accuracy
THRESHOLDS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9)
POINTS = 21  # on each axis of the cut
FOLDER = Path(__file__).parent


@cache
def split(dataset: str, source: str, images: int, test_images: int) -> tuple[Split, Split]:
    """The first images of the training and of the test set, less the mean of these training images."""
    training = load(dataset, source, "train").first(images)
    return training.centered(training), load(dataset, source, "test").first(test_images).centered(training)


def fit(model: nn.Module, training: Split, epochs: int, lr: float, seed: int) -> float:
    """Train by Adam; return the mean loss of the last epoch."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        losses = []
        for index in batches(len(training.labels), BATCH, order):
            images, labels = training.batch(index)
            loss = cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return float(np.mean(losses))


@torch.no_grad()
def predict(model: nn.Module, data: Split) -> Tensor:  # [N, classes]
    return torch.cat([model(data.batch(index)[0]) for index in torch.arange(len(data.labels)).split(250)])


def accuracy(model: nn.Module, data: Split) -> float:
    return (predict(model, data).argmax(1) == data.labels).double().mean().item()


def optimum(network: nn.Module, training: Split, epochs: int, seed: int) -> nn.Module:
    network = copy.deepcopy(network)
    fit(network, training, epochs, OPTIMUM_LR, seed)
    return network


def run(model: nn.Module, d: int, seed: int, training: Split, test: Split, epochs: int) -> dict[str, float | None]:
    """The result of training theta_d in `model`, from its weights."""
    start = time.process_time()
    config = SubspaceConfig(d=d, seed=seed, projection="fastjl", normalization="columns", target_modules="all")
    model = get_peft_model(copy.deepcopy(model), config)
    loss = fit(model, training, epochs, LR, seed)
    return {
        "train_loss": loss if math.isfinite(loss) else None,
        "accuracy": accuracy(model, test),
        "cpu_seconds": round(time.process_time() - start, 2),
    }


def slope(logits: Tensor, on: Tensor) -> float:
    """The slope of a regression of logits on others, both centred over the classes: softmax ignores their mean."""
    logits, on = (part - part.mean(1, keepdim=True) for part in (logits, on))
    return ((logits * on).sum() / on.square().sum()).item()


def cut(w_0: nn.Module, first: nn.Module, second: nn.Module, test: Split) -> dict[str, Any]:
    """The test loss of the network and of its linearisation at `first` on the plane of the three networks.

    The linearisation is affine in w: its outputs on the plane are affine combinations of those at the three points.
    """
    start, *ends = (parameters_to_vector(m.parameters()).detach() for m in (w_0, first, second))
    basis, coordinates = torch.linalg.qr(torch.stack([end - start for end in ends], 1))
    points = torch.cat([torch.zeros(2, 1), coordinates], 1)  # columns: w_0, first, second
    middle, half = (points.amax(1) + points.amin(1)) / 2, 0.75 * (points.amax(1) - points.amin(1)).max()
    x, y = (torch.linspace(-1, 1, POINTS) * half + m for m in middle)
    tangent, moved = linearized(w_0, first.state_dict()), copy.deepcopy(w_0)
    corners = [predict(placed(tangent, model.parameters()), test) for model in (w_0, first, second)]

    def losses(at: Tensor) -> tuple[float, float]:
        vector_to_parameters(start + basis @ at, moved.parameters())
        a, b = torch.linalg.solve(coordinates, at)
        outputs = predict(moved, test), (1 - a - b) * corners[0] + a * corners[1] + b * corners[2]
        return tuple(cross_entropy(output, test.labels).item() for output in outputs)

    maps = np.array([[losses(torch.stack([column, row])) for column in x] for row in y]).round(4)
    return {
        "x": x.tolist(),
        "y": y.tolist(),
        "points": points.T.tolist(),
        **{network: maps[..., i].tolist() for i, network in enumerate(NETWORKS)},
    }


def placed(model: nn.Module, weights: Iterable[Tensor]) -> nn.Module:
    """The model with these weights."""
    vector_to_parameters(parameters_to_vector(weights), model.parameters())
    return model


def sweep(options: argparse.Namespace, file: Path) -> None:
    """Make every run that the file lacks, and write the file after each.

    Raises:
        ValueError: if the file holds runs with other settings.
    """
    record = read_measurement(file) if file.exists() else {"datasets": {}, "runs": []}
    settings = {key: getattr(options, key) for key in ("model", "images", "test_images", "epochs", "optimum_epochs")}
    if record.setdefault("settings", settings) != settings:
        raise ValueError(f"`{file}` holds runs of {record['settings']}, got {settings}; give another `--output`.")
    done = {tuple(r[key] for key in KEYS) for r in record["runs"]}
    grid = itertools.product(options.dataset, options.d, options.seed, NETWORKS)
    missing = [(dataset, network, d, seed) for dataset, d, seed, network in grid]
    missing = [key for key in missing if key not in done]
    models = cache(lambda dataset: prepared(dataset, options, record))
    for key in tqdm(missing, unit="run"):
        dataset, network, d, seed = key
        model = models(dataset)[network]
        data = split(dataset, options.data, options.images, options.test_images)
        record["runs"].append(dict(zip(KEYS, key, strict=True)) | run(model, d, seed, *data, options.epochs))
        write_measurement(file, record)


def prepared(dataset: str, options: argparse.Namespace, record: dict[str, Any]) -> dict[str, nn.Module]:
    """The network at w_0 and its linearisation at the optimum; the record gets what they are."""
    training, test = split(dataset, options.data, options.images, options.test_images)
    w_0 = build(options.model, dataset)
    first, second = (optimum(w_0, training, options.optimum_epochs, seed) for seed in (1, 2))
    models = {"full": w_0, "linearized": linearized(w_0, first.state_dict())}
    if dataset not in record["datasets"]:
        start, end = (parameters_to_vector(m.parameters()) for m in (w_0, first))
        record["datasets"][dataset] = {
            "D": len(start),
            "distance": (end - start).norm().item(),
            "norm_of_w_0": start.norm().item(),
            "optimum": {"train": accuracy(first, training), "test": accuracy(first, test)},
            "start": {network: accuracy(model, test) for network, model in models.items()},
            "slope": slope(predict(models["linearized"], test), predict(first, test)),
            "cut": cut(w_0, first, second, test.first(1000)),
        }
    return models


def parts(record: dict[str, Any]) -> dict[str, str]:
    """The tables "accuracy" and "dimensions"."""
    runs = pd.DataFrame(record["runs"])
    cells = (100 * runs.accuracy).groupby([runs.dataset, runs.d, runs.network]).agg(over_seeds).unstack()
    rows = [[name(data), d, *(cells.loc[(data, d), network] for network in NETWORKS)] for data, d in cells.index]
    accuracies = markdown(["data", "d", "network, %", "linearised, %"], rows)
    rows = []
    for dataset, of_dataset in runs.groupby("dataset", sort=False):
        for network in NETWORKS:
            curve = of_dataset[of_dataset.network == network]
            stars = [threshold_dimension(curve, level, DELTA, "accuracy") for level in THRESHOLDS]
            rows.append([name(dataset), network, *("-" if star.d is None else star.d for star in stars)])
    thresholds = markdown(["d* for an accuracy of", "", *(f"{100 * level:.0f} %" for level in THRESHOLDS)], rows)
    return {"accuracy": "\n".join(accuracies), "dimensions": "\n".join(thresholds)}


def text(record: dict[str, Any]) -> str:
    return joined(parts(record))


def tables() -> dict[str, str]:
    """What the committed results say, for the README."""
    return parts(read_measurement(FOLDER / "linearized.jsonl"))


def plot(record: dict[str, Any], file: Path) -> Path:
    """A row for each data set: the two cuts, and what all runs but one reach."""
    runs = pd.DataFrame(record["runs"])
    datasets = list(dict.fromkeys(runs.dataset))
    figure, axes = panels(len(datasets), 3, width=4.4, height=3.7)
    for row, dataset in zip(axes, datasets, strict=True):
        measured = record["datasets"][dataset]
        for axis, network in zip(row, NETWORKS, strict=False):
            _draw_cut(axis, measured["cut"], network)
            axis.set_title(f"{name(dataset)}: loss{', linearised' * (network == 'linearized')}")
        for at, network in enumerate(NETWORKS):
            curve = runs[(runs.dataset == dataset) & (runs.network == network)]
            row[2].plot(curve.d, 100 * curve.accuracy, ".", color=COLOURS[at], alpha=0.35)
            levels = np.arange(0.1, 1, 0.005)
            stars = [threshold_dimension(curve, level, DELTA, "accuracy", resamples=1).d for level in levels]
            row[2].plot(np.array(stars, dtype=float), 100 * levels, color=COLOURS[at], label=WORDS[network])
        best = 100 * measured["optimum"]["test"]
        row[2].axhline(best, color="black", linestyle=":", linewidth=1, label="the optimum")
        row[2].set(xlabel="dimensions trained, d", ylabel="test accuracy, %", title="Reached by all runs but one")
        counted(row[2], sparse(runs.d), base=2)
        row[2].legend(loc="lower right")
    headline(figure, "Does a network train in a subspace as its linearisation at an optimum does?")
    return save(figure, file)


def _draw_cut(axis: Axes, cut: dict[str, Any], network: str) -> None:
    levels = np.geomspace(0.9 * min(np.min(cut[each]) for each in NETWORKS), 20, 25)
    losses = np.clip(cut[network], levels[0], levels[-1])
    filled = axis.contourf(cut["x"], cut["y"], losses, levels=levels, norm="log", cmap="viridis")
    axis.figure.colorbar(filled, ax=axis, ticks=[0.1, 0.2, 0.5, 1, 2, 5, 10, 20], format="%g")
    for (x, y), label, marker in zip(cut["points"], ("start", "optimum", "another optimum"), "X*P", strict=True):
        axis.plot(x, y, marker, color="white", markeredgecolor="black", markersize=10)
        axis.annotate(label, (x, y), xytext=(6, 6), textcoords="offset points", color="white", fontsize="small")
    axis.set_aspect("equal")
    axis.grid(visible=False)


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(__doc__, FOLDER)
    parser.add_argument("--dataset", nargs="+", choices=SHAPES, default=["mnist", "fashion_mnist"])
    parser.add_argument("--data", default="", help="a folder of parquet files, {dataset} for the name, or a Hub id")
    parser.add_argument("--model", default="conv2")
    parser.add_argument("--images", type=at_least(1), default=5000, help="of the training set, the first so many")
    parser.add_argument("--test_images", type=at_least(1), default=2000)
    parser.add_argument("--epochs", type=at_least(1), default=3, help="of theta_d")
    parser.add_argument("--optimum_epochs", type=at_least(1), default=5, help="of the training to the optimum")
    parser.add_argument("--d", nargs="+", type=at_least(1), default=[2**i for i in range(2, 12)])
    parser.add_argument("--seed", nargs="+", type=at_least(0), default=[0, 1, 2, 3, 4])
    options = parser.parse_args(arguments)
    check(options.model)
    file = options.output / "linearized.jsonl"
    if not options.report:
        torch.set_num_threads(1)
        sweep(options, file)
    record = read_measurement(file)
    print(text(record))
    print(plot(record, options.output / "plots" / "linearized.png"))


if __name__ == "__main__":
    command.run(main)
