"""The best learning rate of theta_d: accuracy by rate and d, with the default normalisation and AdamW.

    python recipes/run.py recipes/learning_rate/sweep.yaml [--network lenet] [--d 64 256] [--output <folder>]
    python recipes/run.py recipes/learning_rate/sweep_80_epochs.yaml

Two networks, a convolutional one and a small transformer, are trained on scikit-learn's digits 0 to 4. Each is then
fine-tuned on the digits 5 to 9 with a new head: theta_d at the rates of the grid, the head at its own fixed rate.
Three methods to compare with: the head alone, full fine-tuning at the rates of the grid, and "found", the rates that
`parameter_groups` finds for theta_d and the head.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from peft import get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import ViTConfig, ViTForImageClassification

from recipes.lab.kinds import measured
from recipes.lab.results import Results
from recipes.lab.settings import PlainSettings, typed
from recipes.reports.figures import GREY, headline, legend_below, panels, plain_ticks, save, style
from recipes.reports.labels import name
from recipes.reports.tables import markdown
from recipes.tasks import models
from recipes.tasks.data import Split, batches, load
from subspace_peft import SubspaceConfig, parameter_groups


HEAD_LR = 1e-2
BATCH = 16
PRETRAINING = 15  # epochs, AdamW at 3e-3
NEAR = 2.0  # points of accuracy below the best rate that still count as the plateau
KEYS = ("network", "method", "lr", "d", "seed")
TYPES = {"network": str, "method": str, "lr": float, "d": int, "seed": int, "epochs": int}
METHODS = ("head", "full", "subspace", "found")
PROBED = 32  # images on which the rate is found


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
"""The builder of each network, the name of its head, and `target_modules`."""


@cache
def half(split: str, low: int) -> Split:
    """The images of the digits low to low + 4, with labels from 0."""
    whole = load("digits", "", split)
    chosen = (whole.labels >= low) & (whole.labels < low + 5)
    return Split(whole.images[chosen], whole.labels[chosen] - low)


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
    """In %."""
    model.eval()
    with torch.no_grad():
        images, labels = data.batch(torch.arange(len(data.labels)))
        return 100 * (model(images).argmax(1) == labels).double().mean().item()


@cache
def pretrained(network: str) -> nn.Module:
    """The network, trained on the digits 0 to 4."""
    torch.manual_seed(0)
    model = NETWORKS[network][0]()
    fit(model, torch.optim.AdamW(model.parameters(), lr=3e-3), half("train", 0), PRETRAINING, seed=0)
    return model


def fine_tune(
    base: nn.Module, epochs: int, network: str, method: str, lr: float, d: int, seed: int
) -> tuple[float, list[float]]:
    """The accuracy on the digits 5 to 9, in %, of a copy of `base` with a new head drawn from the seed, and its rates.

    The rate of the head is the last.
    """
    model, head = copy.deepcopy(base), NETWORKS[network][1]
    torch.manual_seed(seed)
    model.get_submodule(head).reset_parameters()
    if method in ("subspace", "found"):
        config = SubspaceConfig(
            d=d,
            projection="fastfood",
            seed=seed,
            target_modules=NETWORKS[network][2],
            exclude_modules=[head],
            modules_to_save=[head],
        )
        model = get_peft_model(model, config)
        data = half("train", 5)
        found = {"batch": data.batch(torch.arange(PROBED))[0], "steps": epochs * (len(data.labels) // BATCH)}
        given = found if method == "found" else {"lr": lr, "head_lr": HEAD_LR}
        optimizer = torch.optim.AdamW(parameter_groups(model, **given))
    else:
        groups = [{"params": list(model.get_submodule(head).parameters()), "lr": HEAD_LR}]
        if method == "full":
            rest = [p for name, p in model.named_parameters() if not name.startswith(f"{head}.")]
            groups.insert(0, {"params": rest, "lr": lr})
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    rates = [group["lr"] for group in optimizer.param_groups]
    fit(model, optimizer, half("train", 5), epochs, seed)
    return accuracy(model, half("test", 5)), rates


def measure(run: PlainSettings) -> dict[str, Any]:
    torch.set_num_threads(1)  # the last digits of a sum depend on the number of threads
    accuracy, (*rate, head_lr) = fine_tune(pretrained(run["network"]), *(run[key] for key in ("epochs", *KEYS)))
    found = {"found_lr": rate[0]} if run["method"] == "found" else {}
    return {"accuracy": accuracy, "batch": BATCH, "head_lr": head_lr} | found


def settings(values: dict[str, Any]) -> PlainSettings:
    """The settings of one run.

    Raises:
        ValueError: if one is missing, of another type, or unknown.
    """
    if missing := [key for key in TYPES if key not in values]:
        raise ValueError(f"A run must have the settings {', '.join(TYPES)}; give {', '.join(missing)}.")
    run = PlainSettings({key: typed(key, values[key], kind) for key, kind in TYPES.items()})
    for key, known in (("network", NETWORKS), ("method", METHODS)):
        if run[key] not in known:
            raise ValueError(f"`{key}` must be one of {', '.join(known)}, got {run[key]!r}.")
    least = {"epochs": 1, "d": int(run["method"] in ("subspace", "found"))}
    for key, value in least.items():
        if run[key] < value:
            raise ValueError(f"`{key}` of method {run['method']!r} must be at least {value}, got {run[key]}.")
    if run["method"] in ("full", "subspace") and not run["lr"] > 0:
        raise ValueError(f"`lr` of method {run['method']!r} must be above 0, got {run['lr']}.")
    return run


def stays(part: dict[str, Any], key: str, values: list) -> bool:
    """Runs stay where `--lr` and `--d` select what they have not: the head alone has neither."""
    method = part.get("method")
    (method,) = method if isinstance(method, list) and len(method) == 1 else [method]
    return (method, key) in (("head", "lr"), ("head", "d"), ("full", "d"), ("found", "lr"))


def records(runs: list[PlainSettings], results: Results) -> pd.DataFrame:
    """The settings and the accuracy of each run that has a result."""
    shown = ("accuracy", "found_lr")
    return pd.DataFrame(
        [each["settings"] | {key: each[key] for key in shown if key in each} for each in results.records(runs)]
    )


def table(runs: pd.DataFrame) -> pd.DataFrame:
    """Mean accuracy over seeds: one row for each network, method and d, one column for each rate."""
    return runs.pivot_table(index=["network", "method", "d"], columns="lr", values="accuracy", aggfunc="mean")


def text(runs: list[PlainSettings], results: Results) -> str:
    means, rows = table(records(runs, results)), []
    for (network, method, d), row in means.iterrows():
        near = row[row >= row.max() - NEAR].index
        plateau = f"{near.min():g} to {near.max():g}" if method in ("full", "subspace") else ""
        rows.append([network, method, d or "", *("" if pd.isna(value) else f"{value:.1f}" for value in row), plateau])
    rates = [f"{lr:g}" if lr else "no rate" for lr in means]
    return "\n".join(markdown(["network", "method", "d", *rates, "plateau"], rows))


def plot(runs: list[PlainSettings], results: Results, file: Path) -> Path:
    """Accuracy against the rate: a line for each d, with a dot for each seed, and for full fine-tuning."""
    measured = records(runs, results)
    networks = sorted(measured.network.unique())
    figure, (axes,) = panels(1, len(networks), width=5.5, height=4.6, sharey=True)
    for axis, network in zip(axes, networks, strict=True):
        shown = measured[measured.network == network]
        for at, (d, line) in enumerate(shown[shown.method == "subspace"].groupby("d")):
            axis.plot(line.groupby("lr").accuracy.mean(), label=f"subspace, d = {d}", **style(at))
            axis.plot(line.lr, line.accuracy, ".", color=style(at)["color"], markersize=3, alpha=0.6)
            found = shown[(shown.method == "found") & (shown.d == d)]
            if len(found):
                axis.plot(found.found_lr.mean(), found.accuracy.mean(), "*", color=style(at)["color"], markersize=13)
        full = shown[shown.method == "full"].groupby("lr").accuracy.mean()
        axis.plot(full.index, full, color="black", linestyle=":", marker=".", label="full fine-tuning")
        head = shown[shown.method == "head"].accuracy.mean()
        axis.axhline(head, color=GREY, linestyle="--", label="classifier alone")
        axis.plot([], [], "*", color=GREY, markersize=13, linestyle="none", label="the rate that is found")
        axis.set(xlabel="learning rate of θ_d, or of all weights", title=name(network))
        plain_ticks(axis, sorted(set(shown.lr) - {0}))
    axes[0].set_ylabel("test accuracy on the digits 5 to 9, %")
    headline(figure, "Which learning rate does θ_d want?")
    legend_below(figure, columns=4)
    return save(figure, file)


KIND = replace(
    measured("learning_rate.sweep", measure), settings=settings, keys=TYPES, stays=stays, report="learning_rate.sweep"
)
