"""Which learning rate theta_d wants: accuracy by rate and d, with the default normalisation and AdamW.

    python recipes/learning_rate/sweep.py [--lr 1e-4 ...] [--d 64 ...] [--seed 0 1 2] [--epochs 8] [--output <folder>]

Two networks, a convolutional one and a small transformer, are trained on scikit-learn's digits 0 to 4; each is then
fine-tuned on the digits 5 to 9 under a new head: theta_d at the rates of the grid, the head at a rate of its own.
Two lines to compare with: the head alone, and full fine-tuning at its own best rate of the same grid.
A run that is already in the results is not done again.
"""

import argparse
import copy
import json
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from peft import get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import ViTConfig, ViTForImageClassification


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.lab import environment
from recipes.tasks import models
from recipes.tasks.data import Split, batches, load
from subspace_peft import SubspaceConfig, parameter_groups


RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
DIMENSIONS = (64, 256, 1024, 4096)
HEAD_LR = 1e-2
BATCH = 16
EPOCHS = 8
PRETRAINING = 15  # epochs, AdamW at 3e-3
NEAR = 2.0  # points of accuracy below the best rate that still count as the plateau
KEYS = ("network", "method", "lr", "d", "seed")
FOLDER = Path(__file__).parent


class SmallViT(nn.Module):
    """transformers' ViT: hidden 64, 2 layers, 8x8 pixels in patches of 2."""

    def __init__(self):
        super().__init__()
        shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
        images = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 5}
        self.vit = ViTForImageClassification(ViTConfig(**shape, **images))
        self.head, self.vit.classifier = self.vit.classifier, nn.Identity()

    def forward(self, x):
        return self.head(self.vit(pixel_values=2 * x - 1).logits)


def lenet() -> nn.Module:
    model = models.build("lenet", "digits", seed=0)
    *body, last = model
    return nn.Sequential(*body).append(nn.Linear(last.in_features, 5))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "lenet": (lenet, "11", "all"),
    "vit": (SmallViT, "head", "all-linear"),
}
"""How to build each, the name of its head, and what is adapted beside the head."""


@cache
def half(split: str, low: int) -> Split:
    """The images of the digits low to low + 4, with labels from 0."""
    whole = load("digits", "", split)
    mine = (whole.labels >= low) & (whole.labels < low + 5)
    return Split(whole.images[mine], whole.labels[mine] - low)


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, data: Split, epochs: int, seed: int) -> None:
    steps = epochs * (len(data.labels) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for index in batches(len(data.labels), BATCH, order):
            images, labels = data.batch(index)
            cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


def accuracy(model: nn.Module, data: Split) -> float:
    model.eval()
    with torch.no_grad():
        images, labels = data.batch(torch.arange(len(data.labels)))
        return 100 * (model(images).argmax(1) == labels).double().mean().item()


def pretrained(network: str) -> nn.Module:
    torch.manual_seed(0)
    model = NETWORKS[network][0]()
    fit(model, torch.optim.AdamW(model.parameters(), lr=3e-3), half("train", 0), PRETRAINING, seed=0)
    return model


def fine_tune(base: nn.Module, epochs: int, network: str, method: str, lr: float, d: int, seed: int) -> float:
    """Accuracy on the digits 5 to 9 of a copy of `base` under a new head drawn from the seed."""
    model, head = copy.deepcopy(base), NETWORKS[network][1]
    torch.manual_seed(seed)
    model.get_submodule(head).reset_parameters()
    if method == "subspace":
        config = SubspaceConfig(
            d=d, seed=seed, target_modules=NETWORKS[network][2], exclude_modules=[head], modules_to_save=[head]
        )
        model = get_peft_model(model, config)
        optimizer = torch.optim.AdamW(parameter_groups(model, lr=lr, head_lr=HEAD_LR))
    else:
        groups = [{"params": list(model.get_submodule(head).parameters()), "lr": HEAD_LR}]
        if method == "full":
            rest = [p for name, p in model.named_parameters() if not name.startswith(f"{head}.")]
            groups.append({"params": rest, "lr": lr})
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    fit(model, optimizer, half("train", 5), epochs, seed)
    return accuracy(model, half("test", 5))


def sweep(grid: list[tuple], epochs: int, file: Path) -> list[dict]:
    """Every run of the grid that `file` lacks; the file is written after each."""
    results = json.loads(file.read_text())["runs"] if file.exists() else []
    done = {tuple(run[key] for key in KEYS) for run in results}
    missing = [run for run in grid if run not in done]
    bases = cache(pretrained)
    file.parent.mkdir(parents=True, exist_ok=True)
    for run in tqdm(missing, unit="run"):
        results.append(dict(zip(KEYS, run, strict=True)) | {"accuracy": fine_tune(bases(run[0]), epochs, *run)})
        record = {"epochs": epochs, "batch": BATCH, "head_lr": HEAD_LR, "runs": results, **environment.record()}
        draft = file.with_suffix(".draft")
        draft.write_text(json.dumps(record, indent=1) + "\n")
        draft.replace(file)
    return results


def table(results: list[dict]) -> pd.DataFrame:
    """Mean accuracy over seeds: one row for each network, method and d, one column for each rate."""
    runs = pd.DataFrame(results)
    return runs.pivot_table(index=["network", "method", "d"], columns="lr", values="accuracy", aggfunc="mean")


def text(results: list[dict]) -> str:
    means = table(results)
    lines = ["| network | method | d | " + " | ".join(f"{lr:g}" for lr in means) + " | plateau |"]
    lines.append("|" + " --- |" * (len(means.columns) + 4))
    for (network, method, d), row in means.iterrows():
        cells = " | ".join("" if pd.isna(value) else f"{value:.1f}" for value in row)
        near = row[row >= row.max() - NEAR].index
        plateau = f"{near.min():g} to {near.max():g}" if method != "head" else ""
        lines.append(f"| {network} | {method} | {d or ''} | {cells} | {plateau} |")
    return "\n".join(lines)


def plot(results: list[dict], file: Path) -> Path:
    runs = pd.DataFrame(results)
    networks = sorted(runs.network.unique())
    figure, axes = plt.subplots(1, len(networks), figsize=(5.6 * len(networks), 4.4), squeeze=False, sharey=True)
    for axis, network in zip(axes[0], networks, strict=True):
        mine = runs[runs.network == network]
        for marker, (d, line) in zip("os^D", mine[mine.method == "subspace"].groupby("d"), strict=False):
            spread = line.groupby("lr").accuracy.agg(["mean", "std"])
            axis.errorbar(spread.index, spread["mean"], spread["std"], marker=marker, capsize=2, label=f"d = {d}")
        full = mine[mine.method == "full"].groupby("lr").accuracy.mean()
        axis.plot(full.index, full, color="black", linestyle=":", marker=".", label="full fine-tuning")
        axis.axhline(mine[mine.method == "head"].accuracy.mean(), color="grey", linestyle="--", label="head alone")
        axis.axvspan(1e-3, 3e-3, color="tab:green", alpha=0.12)
        axis.set(xscale="log", xlabel="learning rate of theta_d (full fine-tuning: of the weights)", title=network)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small", loc="lower center")
    axes[0][0].set_ylabel("test accuracy on the digits 5 to 9, %")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    plt.close(figure)
    return file


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--lr", nargs="+", type=float, default=list(RATES))
    parser.add_argument("--d", nargs="+", type=int, default=list(DIMENSIONS))
    parser.add_argument("--seed", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of fine-tuning; others are kept in files apart")
    parser.add_argument("--output", type=Path, default=FOLDER)
    options = parser.parse_args(arguments)
    grid = []
    for network in options.network:
        grid += [(network, "head", 0.0, 0, seed) for seed in options.seed]
        grid += [(network, "full", lr, 0, seed) for lr in options.lr for seed in options.seed]
        grid += [(network, "subspace", lr, d, seed) for d in options.d for lr in options.lr for seed in options.seed]
    name = "sweep" if options.epochs == EPOCHS else f"sweep_{options.epochs}_epochs"
    results = sweep(grid, options.epochs, options.output / "results" / f"{name}.json")
    print(text(results))
    print(f"load {os.getloadavg()[0]:.1f}; figure: {plot(results, options.output / 'plots' / f'{name}.png')}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
