"""Compression D_l and separation S_l of the features of each layer, in linear and ReLU networks (Qu 2023).
    python recipes/run.py recipes/deep_linear/collapse.yaml

K classes of n samples each, N = K n orthonormal inputs, one-hot targets: min 1/2 |W_L s(... s(W_1 X)) - Y|_F^2.
Theorem (Wang et al. 2023): D_l falls geometrically, D_{l+1} / D_l between c eps^2 / (kappa (4n)^(1/L)) and
kappa eps^2 / (c (n/2)^(1/L)). To compare, eps^2 / n^(1/L): what varies within classes is scaled by rho = eps in a
layer, what varies between them by the L-th root of the singular values sqrt(n) of Y X^T.
"""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from recipes.deep_linear.networks import Weights, descend, start
from recipes.lab.kinds import measured
from recipes.lab.results import Results
from recipes.lab.rounding import digits
from recipes.lab.settings import PlainSettings
from recipes.reports.dimension import markdown
from recipes.reports.figures import save
from subspace_peft.spectra import ClassFeatures


ACTIVATIONS = {"linear": lambda z: z, "relu": torch.relu}


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


def text(runs: list[PlainSettings], results: Results) -> str:
    runs = results.records(runs)
    rows = []
    for run in runs:
        settings, (ratio, r2) = run["settings"], fit(run)
        expected = settings["eps"] ** 2 / settings["n"] ** (1 / settings["depth"])
        rows.append(
            [settings[key] for key in ("depth", "activation", "start", "eps", "seed")]
            + [", ".join(f"{D:.2g}" for D in run["D"][:-1]), f"{ratio:.4f}", f"{expected:.4f}", f"{r2:.4f}"]
            + [", ".join(f"{S:.2f}" for S in run["S"][:-1]), run["iterations"], f"{run['loss']:.0e}"]
        )
    header = ["depth", "activation", "start", "ε", "seed", "D_1 ... D_{L-1}", "D_{l+1} / D_l", "ε² / n^{1/L}", "R²"]
    return "\n".join(markdown([*header, "S_1 ... S_{L-1}", "iterations", "loss"], rows))


def plot(runs: list[PlainSettings], results: Results, file: Path) -> Path:
    """D_l over layers by depth, by eps and by start, of the first seed; the loss over iterations by eps."""
    runs = results.records(runs)
    runs = [run for run in runs if run["settings"]["seed"] == runs[0]["settings"]["seed"]]
    deep = max(run["settings"]["depth"] for run in runs)
    shallow = [run for run in runs if run["settings"]["depth"] == min(run["settings"]["depth"] for run in runs)]
    figure, axes = plt.subplots(2, 3, figsize=(15, 8), layout="constrained")
    for axis, activation in zip(axes[0], ACTIVATIONS, strict=False):
        chosen = [run for run in runs if run["settings"]["activation"] == activation and run not in shallow]
        _draw(axis, chosen, "depth", f"{activation} networks")
    _draw(
        axes[0][2], [run for run in runs if run["settings"]["depth"] == deep], "activation", f"S_l, depth {deep}", "S"
    )
    scales = [run for run in shallow if run["settings"]["start"] == "orthogonal"]
    _draw(axes[1][0], scales, "eps", "scale of the start")
    for run in scales:
        axes[1][1].plot(run["curve"]["step"], run["curve"]["loss"], label=f"eps {run['settings']['eps']}")
    axes[1][1].set(yscale="log", xlabel="iterations", ylabel="loss", title="scale of the start")
    eps = max(run["settings"]["eps"] for run in shallow)
    _draw(axes[1][2], [run for run in shallow if run["settings"]["eps"] == eps], "start", "kind of the start")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize="small")
    return save(figure, file)


def _draw(axis: plt.Axes, runs: list[dict[str, Any]], key: str, title: str, what: str = "D") -> None:
    for run in runs:
        values = run[what][:-1]
        axis.plot(range(1, len(values) + 1), values, "o-", label=f"{key} {run['settings'][key]}")
    axis.set(xlabel="layer l", ylabel=f"{what}_l", title=title, yscale="log" if what == "D" else "linear")


KIND = measured("deep_linear.collapse", measure)
