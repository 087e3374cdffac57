"""Compression D_l and separation S_l of the features of each layer, in linear and ReLU networks (Qu 2023).
    python recipes/run.py recipes/deep_linear/collapse.yaml

K classes of n samples each, N = K n orthonormal inputs, one-hot targets: min 1/2 |W_L s(... s(W_1 X)) - Y|_F^2.
Theorem (Wang et al. 2023): D_l falls geometrically, D_{l+1} / D_l between c eps^2 / (kappa (4n)^(1/L)) and
kappa eps^2 / (c (n/2)^(1/L)). To compare, eps^2 / n^(1/L): what varies within classes is scaled by rho = eps in a
layer, what varies between them by the L-th root of the singular values sqrt(n) of Y X^T.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from recipes.deep_linear.networks import Weights, descend, start
from recipes.lab.kinds import measured
from recipes.lab.results import Results, digits
from recipes.lab.settings import PlainSettings
from recipes.reports.figures import headline, panels, save, style
from recipes.reports.tables import markdown, span
from subspace_peft.spectra import ClassFeatures


ACTIVATIONS = {"linear": lambda z: z, "relu": torch.relu}
NETWORKS = {"linear": "Linear", "relu": "ReLU"}
KEYS = ("depth", "activation", "start", "eps")


def features(weights: Weights, X: Tensor, activation: str) -> list[Tensor]:
    """z^l of each layer, the last without activation: [d_l, N]"""
    found = []
    for weight in weights[:-1]:
        X = ACTIVATIONS[activation](weight @ X)
        found.append(X)
    return [*found, weights[-1] @ X]


def measure(settings: PlainSettings) -> dict[str, Any]:
    K, n, d, L, activation = (settings[key] for key in ("K", "n", "d", "depth", "activation"))
    generator = torch.Generator().manual_seed(settings["seed"])
    X = start([d, d], "orthogonal", 1.0, generator)[0][:, : K * n]
    labels = torch.arange(K).repeat_interleave(n)
    Y = torch.nn.functional.one_hot(labels).double().T
    weights = start([d] * L + [K], settings["start"], settings["eps"], generator)
    curve: dict[str, list] = {"step": [], "loss": []}

    def watch(step: int, seconds: float, loss: float) -> None:
        curve["step"].append(step)
        curve["loss"].append(loss)

    descent = descend(
        weights, lambda w: (features(w, X, activation)[-1] - Y).square().sum() / 2, settings["lr"],
        settings["iterations"], settings["every"], watch, tolerance=settings["tolerance"], name="collapse",
    )  # fmt: skip
    classes = [ClassFeatures() for _ in weights]
    for found, z in zip(classes, features(weights, X, activation), strict=True):
        found.add(z.T, labels)
    thin = slice(None, None, max(1, len(curve["step"]) // 200))
    return {
        "D": digits([found.compression for found in classes]),
        "S": digits([found.separation for found in classes]),
        "iterations": descent.iterations,
        "loss": digits(descent.loss),
        "seconds": round(descent.seconds, 2),
        "curve": {"step": curve["step"][thin], "loss": digits(curve["loss"][thin])},
    }


def fit(run: dict[str, Any]) -> tuple[float, float]:
    """D_{l+1} / D_l by a straight line through log D_l of the hidden layers, and its R^2."""
    logs = np.log(run["D"][:-1])
    layers = np.arange(len(logs))
    slope, intercept = np.polyfit(layers, logs, 1)
    residual = logs - slope * layers - intercept
    return float(np.exp(slope)), 1 - residual.var() / logs.var()


def expected(settings: dict[str, Any]) -> float:
    """eps^2 / n^(1/L)"""
    return settings["eps"] ** 2 / settings["n"] ** (1 / settings["depth"])


def text(runs: list[PlainSettings], results: Results) -> str:
    """A row for each setting; D and S are those of the first seed."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for record in results.records(runs):
        groups.setdefault(tuple(record["settings"][key] for key in KEYS), []).append(record)
    rows = []
    for key, records in groups.items():
        first, fits = records[0], [fit(record) for record in records]
        ratios = span(*(f"{each(ratio for ratio, _ in fits):.4f}" for each in (min, max)))
        rows.append(
            [*key, len(records), ", ".join(f"{D:.2g}" for D in first["D"][:-1]), ratios]
            + [f"{expected(first['settings']):.4f}", f"{min(r2 for _, r2 in fits):.4f}"]
            + [", ".join(f"{S:.2f}" for S in first["S"][:-1])]
            + [span(*(each(record["iterations"] for record in records) for each in (min, max)))]
            + [f"{max(record['loss'] for record in records):.0e}"]
        )
    header = ["depth", "activation", "start", "ε", "seeds", "D_1 ... D_{L-1}", "D_{l+1} / D_l", "ε² / n^{1/L}", "R²"]
    return "\n".join(markdown([*header, "S_1 ... S_{L-1}", "iterations", "loss"], rows))


def plot(runs: list[PlainSettings], results: Results, file: Path) -> Path:
    """The spread within classes by layer for linear and ReLU networks and by scale; the separation. First seed."""
    records = results.records(runs)
    records = [record for record in records if record["settings"]["seed"] == records[0]["settings"]["seed"]]
    depths = [record["settings"]["depth"] for record in records]
    shallow = [record for record in records if record["settings"]["depth"] == min(depths)]
    figure, axes = panels(2, 2, width=5.5, height=3.9)
    for axis, (activation, words) in zip(axes[0], NETWORKS.items(), strict=True):
        chosen = [record for record in records if record["settings"]["activation"] == activation]
        _draw(axis, [record for record in chosen if record not in shallow], "{depth} layers")
        axis.set_title(f"{words}: spread within classes by layer")
    scales = [record for record in shallow if record["settings"]["start"] == "orthogonal"]
    _draw(axes[1][0], scales, "start scaled by {eps:g}")
    axes[1][0].set_title(f"Smaller start, steeper fall ({min(depths)} layers, linear)")
    deepest = [record for record in records if record["settings"]["depth"] == max(depths)]
    for at, record in enumerate(deepest):
        separation = record["S"][:-1]
        label = NETWORKS[record["settings"]["activation"]]
        axes[1][1].plot(range(1, len(separation) + 1), separation, label=label, **style(at))
    axes[1][1].set(xlabel="layer", ylabel="1 − largest cosine of two class means", ylim=(0, 1))
    axes[1][1].set_title(f"How far apart the classes are ({max(depths)} layers)")
    axes[1][1].legend()
    headline(figure, "How do features of a class collapse to one point, layer by layer?")
    return save(figure, file)


def _draw(axis: Axes, records: list[dict[str, Any]], label: str) -> None:
    """D_l by layer, and dashed, through the first layer, the ratio that is expected of linear networks."""
    for at, record in enumerate(records):
        values, settings = record["D"][:-1], record["settings"]
        layers = np.arange(1, len(values) + 1)
        axis.plot(layers, values, label=label.format(**settings), **style(at))
        if settings["activation"] == "linear":
            axis.plot(layers, values[0] * expected(settings) ** (layers - 1), "k--", linewidth=1)
    if any(record["settings"]["activation"] == "linear" for record in records):
        axis.plot([], [], "k--", linewidth=1, label="predicted: ε² / n^(1/L) a layer")
    axis.set(xlabel="layer", ylabel="spread within / between classes", yscale="log")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend()


KIND = measured("deep_linear.collapse", measure)
