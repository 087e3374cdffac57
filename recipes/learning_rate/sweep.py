"""The best learning rate of theta_d: accuracy by rate and d, with the default normalisation and AdamW.

    python recipes/run.py recipes/learning_rate/sweep.yaml [--network lenet] [--d 64 256] [--output <folder>]
    python recipes/run.py recipes/learning_rate/sweep_steps.yaml

Two networks, a convolutional one and a small transformer, are trained on scikit-learn's digits 0 to 4. Each is then
fine-tuned on the digits 5 to 9 with a new head: theta_d at the rates of the grid, the head at its own fixed rate.
Two more, LeNet and FC of recipes/intrinsic_dimension, are trained on MNIST from their start, as a whole in a subspace.
To compare with: the head alone, full training at the rates of the grid, and the rates that `parameter_groups` finds.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

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
from recipes.reports.tables import by_rate, joined, markdown
from recipes.tasks import models
from recipes.tasks.data import Split, batches, load
from subspace_peft import SubspaceConfig, parameter_groups


HEAD_LR = 1e-2
PRETRAINING = 15  # epochs, AdamW at 3e-3
KEYS = ("network", "method", "lr", "d", "seed")
TYPES = {"network": str, "method": str, "lr": float, "d": int, "seed": int, "epochs": int}
SUBSPACES: dict[str, dict[str, Any]] = {
    "subspace": {"projection": "fastfood"},
    "kronecker": {"projection": "kronecker"},
    "low rank": {"projection": "kronecker", "coordinates": "low_rank", "rank": 4},
}
"""What a method changes in the config; "found", alone or before another, is the same at the rates that are found."""
METHODS = ("head", "full", *SUBSPACES, "found", "found kronecker", "found low rank")
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


class Network(NamedTuple):
    """What is trained, and on what."""

    build: Callable[[], nn.Module]
    head: str  # the name of the new head; "": all is trained from its start
    targets: str
    batch: int


NETWORKS = {
    "lenet": Network(lenet, "11", "all", 16),
    "vit": Network(SmallViT, "head", "all-linear", 16),
    "fc_mnist": Network(partial(models.build, "fc", "mnist"), "", "all", 64),
    "lenet_mnist": Network(partial(models.build, "lenet", "mnist"), "", "all", 64),
}
IMAGES = 10_000  # of MNIST for training; all 10 000 of the test set are measured


@cache
def half(split: str, low: int) -> Split:
    """The images of the digits low to low + 4, with labels from 0."""
    whole = load("digits", "", split)
    chosen = (whole.labels >= low) & (whole.labels < low + 5)
    return Split(whole.images[chosen], whole.labels[chosen] - low)


@cache
def mnist(source: str) -> tuple[Split, Split]:
    return load("mnist", source, "train").first(IMAGES), load("mnist", source, "test")


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, data: Split, epochs: int, batch: int, seed: int) -> None:
    steps = epochs * (len(data.labels) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for index in batches(len(data.labels), batch, order):
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
    build, _, _, batch = NETWORKS[network]
    model = build()
    fit(model, torch.optim.AdamW(model.parameters(), lr=3e-3), half("train", 0), PRETRAINING, batch, seed=0)
    return model


def searched(method: str) -> str:
    """The method whose rates of the grid are compared with the found ones: "found kronecker" -> "kronecker"."""
    return method.removeprefix("found").strip() or "subspace"


def start(network: str, seed: int) -> nn.Module:
    """The network before the training: a pretrained one with a new head drawn from the seed, or all of it drawn."""
    build, head, *_ = NETWORKS[network]
    if not head:
        return build(seed)
    model = copy.deepcopy(pretrained(network))
    torch.manual_seed(seed)
    model.get_submodule(head).reset_parameters()
    return model


def train(
    model: nn.Module, data: Split, epochs: int, network: str, method: str, lr: float, d: int, seed: int
) -> tuple[nn.Module, list[float]]:
    """The trained model and its rates, that of its head last."""
    _, head, targets, batch = NETWORKS[network]
    changes = SUBSPACES.get(searched(method))
    if changes:
        whole = {"exclude_modules": [head], "modules_to_save": [head]} if head else {}
        model = get_peft_model(model, SubspaceConfig(d=d, seed=seed, target_modules=targets, **changes, **whole))
        found = {"batch": data.batch(torch.arange(PROBED))[0], "steps": epochs * (len(data.labels) // batch)}
        given = found if method.startswith("found") else {"lr": lr, "head_lr": HEAD_LR}
        optimizer = torch.optim.AdamW(parameter_groups(model, **given))
    else:
        groups = [{"params": list(model.get_submodule(head).parameters()), "lr": HEAD_LR}] if head else []
        if method == "full":
            rest = [p for name, p in model.named_parameters() if not head or not name.startswith(f"{head}.")]
            groups.insert(0, {"params": rest, "lr": lr})
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    rates = [group["lr"] for group in optimizer.param_groups]
    fit(model, optimizer, data, epochs, batch, seed)
    return model, rates


def measure(run: PlainSettings) -> dict[str, Any]:
    torch.set_num_threads(1)  # the last digits of a sum depend on the number of threads
    network = NETWORKS[run["network"]]
    data, test = (half("train", 5), half("test", 5)) if network.head else mnist(run.get("_data", ""))
    model, rates = train(start(run["network"], run["seed"]), data, run["epochs"], *(run[key] for key in KEYS))
    result = {"accuracy": accuracy(model, test), "batch": network.batch}
    if network.head:
        result["head_lr"] = rates[-1]
    return result | ({"found_lr": rates[0]} if run["method"].startswith("found") else {})


def settings(values: dict[str, Any]) -> PlainSettings:
    """The settings of one run.

    Raises:
        ValueError: if one is missing, of another type, or unknown.
    """
    if missing := [key for key in TYPES if key not in values]:
        raise ValueError(f"A run must have the settings {', '.join(TYPES)}; give {', '.join(missing)}.")
    run = PlainSettings({key: typed(key, values[key], kind) for key, kind in TYPES.items()})
    run |= {key: value for key, value in values.items() if key.startswith("_")}
    for key, known in (("network", NETWORKS), ("method", METHODS)):
        if run[key] not in known:
            raise ValueError(f"`{key}` must be one of {', '.join(known)}, got {run[key]!r}.")
    least = {"epochs": 1, "d": int(run["method"] not in ("head", "full"))}
    for key, value in least.items():
        if run[key] < value:
            raise ValueError(f"`{key}` of method {run['method']!r} must be at least {value}, got {run[key]}.")
    if not run["method"].startswith(("head", "found")) and not run["lr"] > 0:
        raise ValueError(f"`lr` of method {run['method']!r} must be above 0, got {run['lr']}.")
    if run["method"] == "head" and not NETWORKS[run["network"]].head:
        raise ValueError(f"`method` must not be 'head' for network {run['network']!r}, which has no new head.")
    return run


def stays(part: dict[str, Any], key: str, values: list) -> bool:
    """Runs stay where `--lr` and `--d` select what they have not: the head alone has neither."""
    method = part.get("method")
    (method,) = method if isinstance(method, list) and len(method) == 1 else [method]
    found = isinstance(method, str) and method.startswith("found")
    return (method, key) in (("head", "lr"), ("head", "d"), ("full", "d")) or (found and key == "lr")


def records(runs: list[PlainSettings], results: Results) -> pd.DataFrame:
    """The settings and the accuracy of each run that has a result; a network with several epochs is several."""
    shown = ("accuracy", "found_lr")
    table = pd.DataFrame(
        [each["settings"] | {key: each[key] for key in shown if key in each} for each in results.records(runs)]
    )
    if table.groupby("network").epochs.nunique().max() > 1:
        table["network"] += table.epochs.map(", {} epochs".format)
    return table


def trained(method: str, d: int) -> str:
    """What a row of the table says of a run: "full training", "kronecker, d = 64"."""
    words = {"head": "head alone", "full": "full training", "subspace": "fastfood"}
    word = words.get(searched(method), searched(method))
    return word + (f", d = {d:,}" if d else "")


def by_trained(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs with what their row is, in the order of the rows, and their rate: 0 where none is given."""
    words = [trained(method, d) for method, d in zip(runs.method, runs.d, strict=True)]
    return runs.assign(trained=words, rate=runs.lr)


def gaps(runs: pd.DataFrame) -> pd.DataFrame:
    """A row for each network and method that has found rates: the best of the grid, found, and their difference."""
    means = by_trained(runs).pivot_table(index=["network", "trained"], columns="rate", values="accuracy", sort=False)
    searched = means.drop(columns=0.0, errors="ignore").dropna(how="all")
    found = means.reindex(columns=[0.0]).loc[searched.index, 0.0].dropna()
    best = searched.loc[found.index]
    rows = {"best_rate": best.idxmax(axis=1), "best": best.max(axis=1), "found": found}
    return pd.DataFrame(rows).assign(gap=lambda row: row.found - row.best)


def parts(runs: list[PlainSettings], results: Results) -> dict[str, str]:
    """The tables "rates", accuracy by rate, and "found", what the rates that are found give."""
    measured = records(runs, results)
    tables = {"rates": "\n".join(by_rate(by_trained(measured), {"network": "network", "trained": "trained"}))}
    if len(found := gaps(measured)):
        header = ["network", "trained", "best rate", "its accuracy", "at the rate that is found", "difference"]
        rows = [
            [network, what, f"{row.best_rate:g}", f"{row.best:.1f}", f"{row.found:.1f}", f"{row.gap:+.1f}"]
            for (network, what), row in found.iterrows()
        ]
        near = [(found.gap >= -points).sum() for points in (1, 3)]
        said = f"Within 1 point of the best in {near[0]} of {len(found)} rows, within 3 in {near[1]}; "
        said += f"{found.gap.mean():+.1f} on average."
        tables["found"] = "\n".join(markdown(header, rows)) + f"\n\n{said}"
    return tables


def text(runs: list[PlainSettings], results: Results) -> str:
    return joined(parts(runs, results))


def plot(runs: list[PlainSettings], results: Results, file: Path) -> Path:
    """Accuracy against the rate: a line for each d, with a dot for each seed, and for full fine-tuning."""
    measured = records(runs, results)
    networks = sorted(measured.network.unique())
    figure, (axes,) = panels(1, len(networks), width=5.5, height=4.6)
    for axis, network in zip(axes, networks, strict=True):
        shown = measured[measured.network == network]
        weights = shown[shown.method.isin(["subspace", "kronecker"])]
        for at, (d, line) in enumerate(weights.groupby("d")):
            axis.plot(line.groupby("lr").accuracy.mean(), label=f"subspace, d = {d}", **style(at))
            axis.plot(line.lr, line.accuracy, ".", color=style(at)["color"], markersize=3, alpha=0.6)
            found = shown[shown.method.isin(["found", "found kronecker"]) & (shown.d == d)]
            if len(found):
                axis.plot(found.found_lr.mean(), found.accuracy.mean(), "*", color=style(at)["color"], markersize=13)
        full = shown[shown.method == "full"].groupby("lr").accuracy.mean()
        axis.plot(full.index, full, color="black", linestyle=":", marker=".", label="full training")
        for head in shown[shown.method == "head"].groupby("network").accuracy.mean():
            axis.axhline(head, color=GREY, linestyle="--", label="classifier alone")
        axis.plot([], [], "*", color=GREY, markersize=13, linestyle="none", label="the rate that is found")
        axis.set(xlabel="learning rate of θ_d, or of all weights", title=", ".join(map(name, network.split(", "))))
        plain_ticks(axis, sorted(set(weights.lr) | set(full.index)))
    axes[0].set_ylabel("test accuracy, %")
    headline(figure, "Which learning rate does θ_d want?")
    legend_below(figure, columns=4)
    return save(figure, file)


KIND = replace(measured("learning_rate.sweep", measure, options=("data",)), settings=settings, keys=TYPES, stays=stays)
