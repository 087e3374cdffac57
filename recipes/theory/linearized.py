"""The threshold training dimension of a network and of its linearisation at an optimum (Larsen et al. 2021, figure 9).

    python recipes/theory/linearized.py [--data <folder>/{dataset}] [--d 4 8 ...] [--seed 0 1 ...] [--output <folder>]
    python recipes/theory/linearized.py --plot

From w_0 Conv-2 is trained to an optimum by Adam. Then, from w_0 again, theta_d is trained in the network and in its
linearisation at that optimum, with the same P and the same batches for the same d and seed. The two-dimensional cut of
the test loss is that through w_0, this optimum and another one, of other batches. A run that is already in the results
is not done again.
"""

import argparse
import copy
import json
import math
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
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

from recipes.lab import environment
from recipes.reports.dimension import markdown, spread
from recipes.reports.figures import save
from recipes.tasks.data import Split, batches, load
from recipes.tasks.models import build
from subspace_peft import SubspaceConfig
from subspace_peft.landscape import linearized
from subspace_peft.measure import threshold_dimension


NETWORKS = ("full", "linearized")
KEYS = ("dataset", "network", "d", "seed")
BATCH, LR = 128, 0.05  # of theta_d, by Adam, as in the paper
OPTIMUM_LR = 3e-3
DELTA = 0.2  # all runs but one of five
THRESHOLDS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9)
POINTS = 21  # of the cut, each way
FOLDER = Path(__file__).parent


@cache
def split(dataset: str, source: str, images: int, test_images: int) -> tuple[Split, Split]:
    """The first images of each, less the mean image of those trained on."""
    training = load(dataset, source, "train").first(images)
    return training.centered(training), load(dataset, source, "test").first(test_images).centered(training)


def fit(model: nn.Module, training: Split, epochs: int, lr: float, seed: int) -> float:
    """Adam on what is trainable; the mean loss of the last epoch."""
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
    """theta_d in `model`, from its weights."""
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
    """Of the regression of logits on others; a number common to all classes is none of theirs."""
    logits, on = (part - part.mean(1, keepdim=True) for part in (logits, on))
    return ((logits * on).sum() / on.square().sum()).item()


def cut(w_0: nn.Module, first: nn.Module, second: nn.Module, test: Split) -> dict[str, Any]:
    """The test loss of the network and of its linearisation at `first` on the plane of the three, and where they lie.

    The linearisation is affine in w: its outputs on the plane are those at three points, combined.
    """
    start, *ends = (parameters_to_vector(m.parameters()).detach() for m in (w_0, first, second))
    basis, coordinates = torch.linalg.qr(torch.stack([end - start for end in ends], 1))
    points = torch.cat([torch.zeros(2, 1), coordinates], 1)  # columns: w_0, first, second
    middle, half = (points.amax(1) + points.amin(1)) / 2, 0.75 * (points.amax(1) - points.amin(1)).max()
    x, y = (torch.linspace(-1, 1, POINTS) * half + m for m in middle)
    tangent = linearized(w_0, first.state_dict())
    corners = []
    for model in (w_0, first, second):
        vector_to_parameters(parameters_to_vector(model.parameters()), tangent.parameters())
        corners.append(predict(tangent, test))
    moved, losses = copy.deepcopy(w_0), {network: np.zeros((POINTS, POINTS)) for network in NETWORKS}
    for row in range(POINTS):
        for column in range(POINTS):
            at = torch.stack([x[column], y[row]])
            vector_to_parameters(start + basis @ at, moved.parameters())
            a, b = torch.linalg.solve(coordinates, at)
            outputs = predict(moved, test), (1 - a - b) * corners[0] + a * corners[1] + b * corners[2]
            for network, output in zip(NETWORKS, outputs, strict=True):
                losses[network][row, column] = cross_entropy(output, test.labels).item()
    return {
        "x": x.tolist(),
        "y": y.tolist(),
        "points": points.T.tolist(),
        **{network: values.round(4).tolist() for network, values in losses.items()},
    }


def sweep(options: argparse.Namespace, file: Path) -> dict[str, Any]:
    """Every run that `file` lacks; it is written after each."""
    record = json.loads(file.read_text()) if file.exists() else {"datasets": {}, "runs": []}
    settings = {key: getattr(options, key) for key in ("model", "images", "test_images", "epochs", "optimum_epochs")}
    if record.setdefault("settings", settings) != settings:
        raise ValueError(f"`{file}` holds runs of {record['settings']}, got {settings}; give another `output`.")
    done = {tuple(r[key] for key in KEYS) for r in record["runs"]}
    grid = [
        (dataset, network, d, seed)
        for dataset in options.dataset
        for d in options.d
        for seed in options.seed
        for network in NETWORKS
    ]
    models = cache(lambda dataset: prepared(dataset, options, record))
    for key in tqdm([key for key in grid if key not in done], unit="run"):
        dataset, network, d, seed = key
        model = models(dataset)[network]
        data = split(dataset, options.data, options.images, options.test_images)
        record["runs"].append(dict(zip(KEYS, key, strict=True)) | run(model, d, seed, *data, options.epochs))
        write(record | environment.record(), file)
    return record


def prepared(dataset: str, options: argparse.Namespace, record: dict[str, Any]) -> dict[str, nn.Module]:
    """The network at w_0 and its linearisation at the optimum; what they are goes into the record."""
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


def write(record: dict[str, Any], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".draft")
    draft.write_text(json.dumps(record, indent=1) + "\n")
    draft.replace(file)


def text(record: dict[str, Any]) -> str:
    runs, lines = pd.DataFrame(record["runs"]), []
    means = runs.groupby(["dataset", "d", "network"]).accuracy.agg(["mean", "std"]).mul(100)
    cells = means.apply(lambda row: spread(row["mean"], row["std"]), axis=1).unstack()
    rows = [[dataset, d, *(cells.loc[(dataset, d), network] for network in NETWORKS)] for dataset, d in cells.index]
    lines += [*markdown(["data", "d", "network %", "linearised %"], rows), ""]
    rows = []
    for dataset, mine in runs.groupby("dataset", sort=False):
        for network in NETWORKS:
            curve = mine[mine.network == network]
            stars = [threshold_dimension(curve, level, DELTA, "accuracy") for level in THRESHOLDS]
            rows.append([dataset, network, *("-" if star.d is None else star.d for star in stars)])
    return "\n".join([*lines, *markdown(["d*", "", *(f"{100 * level:.0f} %" for level in THRESHOLDS)], rows)])


def plot(record: dict[str, Any], file: Path) -> Path:
    """A row for each data set: the two cuts, and d* of both."""
    runs = pd.DataFrame(record["runs"])
    names = list(dict.fromkeys(runs.dataset))
    figure, axes = plt.subplots(len(names), 3, figsize=(14, 4.2 * len(names)), squeeze=False, layout="constrained")
    for (left, middle, right), name in zip(axes, names, strict=True):
        for axis, network in zip((left, middle), NETWORKS, strict=True):
            _draw_cut(axis, record["datasets"][name]["cut"], network)
            axis.set_title(f"{name}: test loss, {network}")
        for network in NETWORKS:
            mine = runs[(runs.dataset == name) & (runs.network == network)]
            (dots,) = right.plot(mine.d, 100 * mine.accuracy, ".", alpha=0.35)
            levels = np.arange(0.1, 1, 0.005)
            stars = [threshold_dimension(mine, level, DELTA, "accuracy", resamples=1).d for level in levels]
            right.plot(np.array(stars, dtype=float), 100 * levels, color=dots.get_color(), label=f"d*, {network}")
        best = record["datasets"][name]["optimum"]["test"]
        right.axhline(100 * best, color="black", linestyle=":", linewidth=1, label="the optimum")
        right.set(xscale="log", xlabel="d", ylabel="test accuracy, %", title=f"threshold training dimension, {name}")
        right.set_xscale("log", base=2)
        right.grid(alpha=0.3)
        right.legend(fontsize="small", loc="lower right")
    return save(figure, file)


def _draw_cut(axis: Axes, cut: dict[str, Any], network: str) -> None:
    levels = np.geomspace(0.9 * min(np.min(cut[name]) for name in NETWORKS), 20, 25)
    losses = np.clip(cut[network], levels[0], levels[-1])
    filled = axis.contourf(cut["x"], cut["y"], losses, levels=levels, norm="log", cmap="viridis")
    axis.figure.colorbar(filled, ax=axis, ticks=[0.1, 0.2, 0.5, 1, 2, 5, 10, 20], format="%g")
    for (x, y), label, marker in zip(cut["points"], ("w_0", "optimum 1", "optimum 2"), "X*P", strict=True):
        axis.plot(x, y, marker, color="white", markeredgecolor="black", markersize=10)
        axis.annotate(label, (x, y), xytext=(6, 6), textcoords="offset points", color="white", fontsize="small")
    axis.set_aspect("equal")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", nargs="+", default=["mnist", "fashion_mnist"])
    parser.add_argument("--data", default="", help="a folder of parquet files, {dataset} for the name, or a Hub id")
    parser.add_argument("--model", default="conv2")
    parser.add_argument("--images", type=int, default=5000, help="of the training set, the first so many")
    parser.add_argument("--test_images", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=3, help="of theta_d")
    parser.add_argument("--optimum_epochs", type=int, default=5, help="of the training to the optimum")
    parser.add_argument("--d", nargs="+", type=int, default=[2**i for i in range(2, 12)])
    parser.add_argument("--seed", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--output", type=Path, default=FOLDER)
    parser.add_argument(
        "--plot", action="store_true", help="table and figure from the results that are there, no runs"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    file = options.output / "results" / "linearized.json"
    record = json.loads(file.read_text()) if options.plot else sweep(options, file)
    print(text(record))
    print(plot(record, options.output / "plots" / "linearized.png"))


if __name__ == "__main__":
    main()
