"""Singular values and subspaces of deep linear networks under gradient descent, and the law of parsimony in numbers.
    python recipes/run.py recipes/deep_linear/dynamics.yaml

Qu 2023, after Yaras et al. 2023: W_l(t) = U_l diag(W~_l(t), rho(t) I) V_l^T with U_l, V_l that do not move. They are
known before training: V_{1,2} is the null space of Phi and of Phi^T W_{L:1}(0), U_{l,2} = W_{l:1}(0) V_{1,2} / eps^l =
V_{l+1,2}. And rho follows a recursion of its own, with weight decay lambda:

    rho(t + 1) = (1 - eta lambda) rho(t) - eta rho(t)^(2L - 1)      case 1, d_y = d_x, rank r
    rho(t + 1) = (1 - eta lambda) rho(t)                            case 2, d_y = r
"""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from recipes.deep_linear.networks import Weights, descend, product, start
from recipes.lab.kinds import measured
from recipes.lab.results import Results
from recipes.lab.rounding import digits
from recipes.lab.settings import PlainSettings
from recipes.reports.dimension import markdown
from recipes.reports.figures import save
from subspace_peft.spectra import SIDES, Spectra


KEYS = ("case", "whitened", "eps", "momentum", "weight_decay")


def data(settings: PlainSettings, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """X [d, N] and Y = Phi X [d_y, N], Phi of rank r: the top of a square Gaussian matrix, or r rows of one."""
    d, r = settings["d"], settings["rank"]
    Phi = torch.randn(d, d, generator=generator, dtype=torch.float64)
    if settings["case"] == 1:
        U, sigma, Vh = torch.linalg.svd(Phi)
        Phi = U[:, :r] * sigma[:r] @ Vh[:r]
    else:
        Phi = Phi[:r]
    if settings["whitened"]:
        X = torch.eye(d, dtype=torch.float64)
    else:
        X = torch.randn(d, settings["samples"], generator=generator, dtype=torch.float64) / settings["samples"] ** 0.5
    return X, Phi @ X


def invariant(weights: Weights, Phi: Tensor, r: int, eps: float) -> list[Tensor]:
    """V_{1,2}, then U_{l,2} of each layer but the last: [d, d - 2r] each."""
    rows = (
        torch.cat([Phi, Phi.mT @ product(weights)]) if len(Phi) == Phi.shape[1] else torch.cat([Phi, product(weights)])
    )
    subspaces = [torch.linalg.svd(rows).Vh[2 * r :].mT]
    for weight in weights:
        subspaces.append(weight @ subspaces[-1] / eps)
    return subspaces


def measure(settings: PlainSettings) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(settings["seed"])
    d, r, L, eps, case = (settings[key] for key in ("d", "rank", "depth", "eps", "case"))
    lr, beta, decay = (settings[key] for key in ("lr", "momentum", "weight_decay"))
    X, Y = data(settings, generator)
    weights = start([d] * L + [len(Y)], "orthogonal", eps, generator)
    layers = L if case == 1 else L - 1  # the last of case 2 has no complement
    subspaces = invariant(weights, Y @ X.mT, r, eps)
    spectra, names = Spectra(rank=r, reference=1), [f"W_{i + 1}" for i in range(L)]
    rho, velocity, seen = eps, 0.0, {"step": [], "loss": [], "rho": [], "deviation": [], "values": []}

    def watch(step: int, seconds: float, loss: float) -> None:
        nonlocal rho, velocity
        if step:
            velocity = beta * velocity + decay * rho + (rho ** (2 * L - 1) if case == 1 else 0.0)
            rho -= lr * velocity
        if step % settings["every"] and step != 1:
            return
        spectra.add(dict(zip(names, weights, strict=True)), step)
        middle = torch.cat([spectra.singular_values(name)[-1, r : d - r] for name in names[:layers]])
        away = [
            torch.linalg.matrix_norm(part, 2).item()
            for weight, V, U in list(zip(weights, subspaces, subspaces[1:], strict=False))[:layers]
            for part in (weight @ V - rho * U, weight.mT @ U - rho * V)
        ]
        values = (middle - rho).abs().max().item()
        for key, value in zip(seen, (step, loss, rho, max(away), values), strict=True):
            seen[key].append(value)

    descent = descend(
        weights, lambda w: (product(w) @ X - Y).square().sum() / 2, lr, settings["iterations"], watch=watch,
        momentum=beta, weight_decay=decay, name="dynamics",
    )  # fmt: skip
    found = {name: _layer(spectra, name) for name in names}
    return {**{key: digits(each) for key, each in seen.items()}, "layers": found, "seconds": round(descent.seconds, 2)}


def _layer(spectra: Spectra, name: str) -> dict[str, Any]:
    """Singular values; of each side the angles of the first and last r vectors, and the largest of the middle."""
    outer = [*range(spectra.rank), *range(-spectra.rank, 0)]  # single vectors of the middle are arbitrary
    middle = {side: spectra.angles(name, side, "middle") for side in SIDES}
    return {
        "singular_values": digits(spectra.singular_values(name)),
        "vector_angles": {side: digits(spectra.vector_angles(name, side)[:, outer]) for side in SIDES},
        "middle": {side: digits(each.amax(1)) if each.shape[1] else None for side, each in middle.items()},
    }


def text(runs: list[PlainSettings], results: Results) -> str:
    runs = results.records(runs)
    rows = []
    for run in runs:
        settings = run["settings"]
        turned = [
            max(each for each in layer["middle"][side] if each is not None)
            for layer in run["layers"].values()
            for side in SIDES
            if layer["middle"][side]
        ]
        rows.append(
            [settings[key] for key in KEYS]
            + [f"{run['loss'][0]:.3g} → {run['loss'][-1]:.3g}", f"{run['rho'][-1]:.4f}"]
            + [f"{max(run[key]):.1e}" for key in ("deviation", "values")]
            + [f"{max(turned):.1e}"]
        )
    header = [*KEYS, "loss", "ρ at the end", "max ‖W_l V − ρU‖", "max |σ_i − ρ|, middle", "max angle, middle, rad"]
    return "\n".join(markdown(header, rows))


def plot(runs: list[PlainSettings], results: Results, file: Path) -> Path:
    """A row for each layer of the first run, and the first layer of one with momentum and of one unwhitened."""
    runs = results.records(runs)
    rows = [(runs[0], name, "") for name in runs[0]["layers"]]
    for key, value, title in (("momentum", 0.9, "with momentum"), ("whitened", False, "data not whitened")):
        rows += [(run, "W_1", title) for run in runs if run["settings"][key] == value][:1]
    figure, axes = plt.subplots(len(rows), 3, figsize=(13, 3.2 * len(rows)), layout="constrained", squeeze=False)
    for row, (run, name, title) in zip(axes, rows, strict=True):
        _draw(row, run, name, title)
    return save(figure, file)


def _draw(axes: list[plt.Axes], run: dict[str, Any], name: str, title: str) -> None:
    """Singular values, right and left angles; the vectors of the middle are arbitrary, so of these the block alone."""
    layer, r = run["layers"][name], run["settings"]["rank"]
    values = torch.tensor(layer["singular_values"])
    axes[0].plot(run["step"], values[:, r:-r], color="tab:grey", linewidth=1)
    axes[0].plot(run["step"], values[:, :r], color="tab:red", linewidth=1)
    axes[0].plot(run["step"], values[:, -r:], color="tab:blue", linewidth=1)
    axes[0].plot(run["step"], run["rho"], "k--", linewidth=1, label="ρ(t), its recursion")
    axes[0].set(xlabel="iteration", ylabel=f"singular values of {name}", title=title)
    for axis, side in zip(axes[1:], ("right", "left"), strict=True):
        angles = torch.tensor([_numbers(row) for row in layer["vector_angles"][side]])
        for part, color, which in ((slice(0, r), "red", "top"), (slice(-r, None), "blue", "last")):
            lines = axis.plot(run["step"], angles[:, part], color=f"tab:{color}", linewidth=1)
            lines[0].set_label(f"{which} {r}, each")
        if layer["middle"][side]:
            middle = _numbers(layer["middle"][side])
            axis.plot(run["step"], middle, color="tab:grey", linewidth=2, label="middle, largest principal angle")
        axis.set(xlabel="iteration", ylabel=f"angle, {side} vectors of {name}, rad", ylim=(-0.05, 1.62))
    for axis in axes[:2]:
        axis.legend(fontsize="small")


def _numbers(values: list[float | None]) -> list[float]:
    return [float("nan") if each is None else each for each in values]


KIND = measured("deep_linear.dynamics", measure)
