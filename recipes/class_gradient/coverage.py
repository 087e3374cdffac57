"""How much of the Hessian's top eigenspace the class gradients cover, and how well they tell its curvature.

    python recipes/class_gradient/coverage.py [--dataset mnist] [--data <folder>] [--seeds 5] [--output <folder>]
    python recipes/class_gradient/coverage.py --report

The poster of Tuddenham et al. 2020 leaves this open. SGD trains the network of 408 parameters. At the start and after
1, 2, 4, ... epochs, on all training images, these are computed: the class gradients c_k (equation 1), the low-rank
Hessian of equation (3) with its eigenpairs (mu_k, u_k), and the top C eigenpairs (V) of the true Hessian by Lanczos.

- coverage: |Q^T V|_F^2 / C, the share of the top-C eigenspace in span(c) = span(Q); C / n if c were random
- curvature: mu_k / (u_k^T H u_k), the curvature that Newton's method assumes over the true one; below 1 its step is
  too long; with the weights of equation (3), and with those over all examples, mean[p_k (1 - p_k)]
- gradient: the shares of |g|^2 in span(c) and in the top-C eigenspace
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.lab import command
from recipes.lab.measurement import Parser, at_least, measured, positive
from recipes.lab.results import read_measurement
from recipes.reports.figures import GREY, headline, panels, save, style
from recipes.reports.tables import markdown, spread
from recipes.tasks.data import Split, batches, load
from recipes.tasks.models import CLASSES, build
from subspace_peft.landscape import coverage, hessian_product, lanczos
from subspace_peft.optim import class_gradients


RATIOS = {"ratios": "by the class's own examples (3)", "ratios_of_all": "by all examples"}
CURVES = {
    "coverage": "directions of largest curvature, in the class gradients",
    "gradient_in_classes": "gradient, in the class gradients",
    "gradient_in_top": "gradient, in the directions of largest curvature",
}


def measure(network: nn.Module, split: Split, C: int) -> dict[str, Any]:
    """The quantities above at one point of training."""
    params = list(network.parameters())
    n = sum(p.numel() for p in params)
    images, labels = split.batch(torch.arange(len(split.labels)))
    logits = network(images)
    loss = cross_entropy(logits, labels)
    gradients = class_gradients(logits, labels, params)
    g = torch.cat([part.flatten() for part in torch.autograd.grad(loss, params)]).double()
    product = hessian_product(lambda: cross_entropy(network(images), labels), params)
    eigenvalues, V = lanczos(product, n, C, tol=1e-2)
    ratios = {}
    for kind, weight in (("ratios", gradients.weight), ("ratios_of_all", gradients.weight_of_all)):
        assumed, U = low_rank(gradients.c.double(), weight.double())
        ratios[kind] = (assumed / torch.stack([u @ product(u) for u in U.T])).tolist()
    return {
        "loss": loss.item(),
        "accuracy": (logits.argmax(1) == labels).double().mean().item(),
        "coverage": coverage(gradients.c, V),
        "gradient_in_classes": coverage(gradients.c, g[:, None]),
        "gradient_in_top": coverage(V.T, g[:, None]),
        "eigenvalues": eigenvalues.tolist(),
        **ratios,
    }


def low_rank(c: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenpairs of sum_k weight_k c_k c_k^T with nonzero eigenvalues: mu [r] descending, u [n, r]."""
    U, s, _ = torch.linalg.svd((weight.sqrt()[:, None] * c).T, full_matrices=False)
    nonzero = s > 1e-6 * s[0]
    return s[nonzero].square(), U[:, nonzero]


def train(split: Split, dataset: str, seed: int, epochs: int, lr: float, batch_size: int) -> list[dict[str, Any]]:
    """SGD, measured at the start and after 1, 2, 4, ... epochs."""
    network, points = build("cnn", dataset, seed), []
    optimizer = torch.optim.SGD(network.parameters(), lr=lr)
    order = torch.Generator().manual_seed(seed)
    for epoch in tqdm(range(epochs + 1), desc=f"seed {seed}", unit="epoch"):
        if epoch & (epoch - 1) == 0:
            points.append({"epoch": epoch} | measure(network, split, CLASSES[dataset]))
        for index in batches(len(split.labels), batch_size, order):
            images, labels = split.batch(index)
            optimizer.zero_grad()
            cross_entropy(network(images), labels).backward()
            optimizer.step()
    return points


def text(runs: list[list[dict[str, Any]]]) -> str:
    header = ["epoch", "loss", "accuracy %", "coverage", "g² in span(c)", "g² in top C", "λ_1"]
    header += [f"median μ / uᵀHu, {label}" for label in ("own examples (3)", "all examples")] + ["uᵀHu ≤ 0"]
    rows = []
    for points in zip(*runs, strict=True):
        mean = {key: np.mean([p[key] for p in points]) for key in ("loss", "accuracy", *CURVES)}
        ratios = {key: np.concatenate([p[key] for p in points]) for key in RATIOS}
        row = [points[0]["epoch"], f"{mean['loss']:.3f}", f"{100 * mean['accuracy']:.1f}"]
        row += [spread(mean["coverage"], np.std([p["coverage"] for p in points]))]
        row += [f"{mean['gradient_in_classes']:.2f}", f"{mean['gradient_in_top']:.2f}"]
        row += [f"{np.mean([p['eigenvalues'][0] for p in points]):.2f}"]
        row += [f"{np.median(r[r > 0]):.2f}" for r in ratios.values()]
        row += [f"{100 * np.mean(ratios['ratios'] <= 0):.0f} %"]
        rows.append(row)
    return "\n".join(markdown(header, rows))


def tables() -> dict[str, str]:
    """What the committed results say, for the README."""
    return {"": text(read_measurement(Path(__file__).parent / "coverage.jsonl")["runs"])}


def plot(runs: list[list[dict[str, Any]]], n: int, C: int, file: Path) -> Path:
    """The shares, means over seeds; the quotient of curvatures, median and quartiles over seeds and classes."""
    figure, (axes,) = panels(1, 2, width=5.5, height=5.0)
    epochs = [point["epoch"] for point in runs[0]]
    places = np.arange(len(epochs))
    for at, (key, label) in enumerate(CURVES.items()):
        values = np.array([[point[key] for point in points] for points in runs])
        axes[0].errorbar(places + 0.06 * (at - 1), values.mean(0), values.std(0), capsize=2, label=label, **style(at))
    axes[0].axhline(C / n, color=GREY, linestyle="--", label=f"a random subspace: {C} of {n} dimensions")
    axes[0].set(ylabel="share, mean and deviation over seeds", ylim=(0, 1.05), title=f"What {C} directions hold")
    for at, (key, label) in enumerate(RATIOS.items()):
        pooled = [np.concatenate([points[place][key] for points in runs]) for place in places]
        low, middle, high = np.array([np.quantile(r[r > 0], (0.25, 0.5, 0.75)) for r in pooled]).T
        axes[1].plot(places, middle, label=label, **style(at))
        axes[1].fill_between(places, low, high, alpha=0.15, linewidth=0)
    axes[1].axhline(1, color=GREY, linestyle="--", label="as it is")
    axes[1].set(ylabel="curvature, assumed / true", yscale="log")
    axes[1].set_title("How well the class gradients tell the curvature")
    axes[1].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[1].yaxis.set_major_formatter("{x:g}")
    axes[1].yaxis.set_minor_formatter(NullFormatter())
    for axis in axes:
        axis.set(xlabel="epochs of SGD", xticks=places, xticklabels=epochs)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False)
    headline(figure, "Are the class gradients the directions of large curvature?")
    return save(figure, file)


def trainings(options: argparse.Namespace) -> dict[str, Any]:
    """One training a seed."""
    split = load(options.dataset, options.data, "train").first(options.images)
    schedule = (options.epochs, options.lr, options.batch_size)
    runs = [train(split, options.dataset, seed, *schedule) for seed in range(options.seeds)]
    settings = {key: value for key, value in vars(options).items() if key not in ("output", "data", "report")}
    return {"settings": settings, "runs": runs}


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(__doc__, Path(__file__).parent)
    parser.add_argument("--dataset", default="mnist", choices=CLASSES)
    parser.add_argument("--data", default="", help="a folder of parquet files, or another Hub id")
    parser.add_argument("--images", type=at_least(1), default=2000, help="of the training set, the first so many")
    parser.add_argument("--seeds", type=at_least(1), default=5, help="how many")
    parser.add_argument("--epochs", type=at_least(1), default=32)
    parser.add_argument("--lr", type=positive, default=0.1)
    parser.add_argument("--batch_size", type=at_least(1), default=100)
    options = parser.parse_args(arguments)
    record = measured(options.output / "coverage.jsonl", options.report, lambda: trainings(options))
    dataset, runs = record["settings"]["dataset"], record["runs"]
    n = sum(p.numel() for p in build("cnn", dataset).parameters())
    print(text(runs))
    print(plot(runs, n, CLASSES[dataset], options.output / "plots" / "coverage.png"))


if __name__ == "__main__":
    command.run(main)
