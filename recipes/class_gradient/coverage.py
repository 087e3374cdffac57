"""How much of the Hessian's top eigenspace the class gradients cover, and how well they tell its curvature.

    python recipes/class_gradient/coverage.py [--dataset mnist] [--data <folder>] [--seeds 5] [--output <folder>]

The question that the poster of Tuddenham et al. 2020 leaves open. The network of 408 parameters is trained by SGD;
after each power of two of epochs, on all training images: the class gradients c_k (equation 1), the low-rank Hessian
of equation (3) with its eigenpairs (mu_k, u_k), and the top C eigenpairs of the true Hessian by Lanczos.

- coverage: the share of the top-C eigenspace that lies in span(c), |Q^T V|_F^2 / C; C / n if c were random
- curvature: mu_k / (u_k^T H u_k), what Newton's method believes against what is there; below 1 its step is too long;
  with the weights of equation (3), and with those over all examples, mean[p_k (1 - p_k)]
- gradient: the share of |g|^2 in span(c), and in the top-C eigenspace
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.lab import environment
from recipes.reports.dimension import markdown, spread
from recipes.reports.figures import save
from recipes.tasks.data import Split, batches, load
from recipes.tasks.models import CLASSES, build
from subspace_peft.landscape import coverage, hessian_product, lanczos
from subspace_peft.optim import class_gradients


RATIOS = {"ratios": "own examples (3)", "ratios_of_all": "all examples"}
CURVES = {
    "coverage": "top-C eigenspace in span(c)",
    "gradient_in_classes": "|g|² in span(c)",
    "gradient_in_top": "|g|² in the top-C eigenspace",
}


def measure(network: nn.Module, split: Split, C: int) -> dict[str, Any]:
    """One point of training; see above."""
    params = list(network.parameters())
    n = sum(p.numel() for p in params)
    images, labels = split.batch(torch.arange(len(split.labels)))
    logits = network(images)
    loss = cross_entropy(logits, labels)
    found = class_gradients(logits, labels, params)
    g = torch.cat([part.flatten() for part in torch.autograd.grad(loss, params)]).double()
    product = hessian_product(lambda: cross_entropy(network(images), labels), params)
    eigenvalues, V = lanczos(product, n, C, tol=1e-2)
    ratios = {}
    for kind, weight in (("ratios", found.weight), ("ratios_of_all", found.weight_of_all)):
        believed, U = low_rank(found.c.double(), weight.double())
        ratios[kind] = (believed / torch.stack([u @ product(u) for u in U.T])).tolist()
    return {
        "loss": loss.item(),
        "accuracy": (logits.argmax(1) == labels).double().mean().item(),
        "coverage": coverage(found.c, V),
        "gradient_in_classes": coverage(found.c, g[:, None]),
        "gradient_in_top": coverage(V.T, g[:, None]),
        "eigenvalues": eigenvalues.tolist(),
        **ratios,
    }


def low_rank(c: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenpairs of sum_k weight_k c_k c_k^T, without those of no curvature: mu [r] descending, u [n, r]."""
    U, s, _ = torch.linalg.svd((weight.sqrt()[:, None] * c).T, full_matrices=False)
    there = s > 1e-6 * s[0]
    return s[there].square(), U[:, there]


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
    header += [f"median μ / uᵀHu, {label}" for label in RATIOS.values()] + ["uᵀHu ≤ 0"]
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


def plot(runs: list[list[dict[str, Any]]], n: int, C: int, file: Path) -> Path:
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.8, 4.8), layout="constrained")
    epochs = [point["epoch"] for point in runs[0]]
    places = np.arange(len(epochs))
    for key, label in CURVES.items():
        values = np.array([[point[key] for point in points] for points in runs])
        left.plot(places, values.mean(0), "o-", label=label)
        left.fill_between(places, values.min(0), values.max(0), alpha=0.15)
    left.axhline(C / n, color="grey", linestyle="--", label=f"C / n = {C / n:.3f}, a random subspace")
    left.set(xlabel="epochs of SGD", ylabel="share", ylim=(0, 1), xticks=places, xticklabels=epochs)
    for key, label in RATIOS.items():
        pooled = [np.concatenate([points[place][key] for points in runs]) for place in places]
        low, middle, high = np.array([np.quantile(r[r > 0], (0.25, 0.5, 0.75)) for r in pooled]).T
        right.plot(places, middle, "o-", label=label)
        right.fill_between(places, low, high, alpha=0.15)
    right.axhline(1, color="grey", linestyle="--")
    right.set(xlabel="epochs of SGD", ylabel="curvature: believed / true (median, quartiles)", yscale="log")
    right.set(xticks=places, xticklabels=epochs)
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    return save(figure, file)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="mnist", choices=CLASSES)
    parser.add_argument("--data", default="", help="a folder of parquet files, or another Hub id")
    parser.add_argument("--images", type=int, default=2000, help="of the training set, the first so many")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--batch_size", type=int, default=100)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    options = parser.parse_args(arguments)
    split = load(options.dataset, options.data, "train").first(options.images)
    schedule = (options.epochs, options.lr, options.batch_size)
    runs = [train(split, options.dataset, seed, *schedule) for seed in range(options.seeds)]
    settings = {key: value for key, value in vars(options).items() if key not in ("output", "data")}
    file = options.output / "results" / "coverage.json"
    environment.write(file, {"settings": settings, "runs": runs})
    print(text(runs))
    n = sum(p.numel() for p in build("cnn", options.dataset).parameters())
    print(plot(runs, n, CLASSES[options.dataset], options.output / "plots" / "coverage.png"))


if __name__ == "__main__":
    main()
