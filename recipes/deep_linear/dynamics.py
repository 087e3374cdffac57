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

import torch
from matplotlib.axes import Axes
from torch import Tensor

from recipes.deep_linear.networks import Weights, descend, product, start
from recipes.lab.kinds import measured
from recipes.lab.results import Results, digits
from recipes.lab.settings import PlainSettings
from recipes.reports.figures import COLOURS, GREY, headline, legend_below, panels, save
from recipes.reports.tables import markdown
from subspace_peft.spectra import SIDES, Spectra


FAR = 1e-6
"""A distance from the theory that is no rounding."""
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
    """The largest deviations over all iterations, layers and seeds of each setting."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for record in results.records(runs):
        groups.setdefault(tuple(record["settings"][key] for key in KEYS), []).append(record)
    rows = []
    for (case, whitened, eps, momentum, decay), records in groups.items():
        first = records[0]
        data = "whitened" if whitened else f"{first['settings']['samples']} Gaussian samples"
        rows.append(
            [case, data, f"{eps:g}", f"{momentum:g}", f"{decay:g}", len(records)]
            + [f"{first['loss'][0]:.3g} → {first['loss'][-1]:.2g}", f"{first['rho'][-1]:.4f}"]
            + [f"{max(max(record[key]) for record in records):.1e}" for key in ("deviation", "values")]
            + [f"{max(_turned(record) for record in records):.1e}"]
        )
    header = ["case", "data", "ε", "momentum", "λ", "seeds", "loss (first seed)", "ρ at the end (first seed)"]
    header += ["max ‖W_l V − ρU‖", "max abs(σ_i − ρ), middle", "max angle, middle, rad"]
    return "\n".join(markdown(header, rows))


def _turned(record: dict[str, Any]) -> float:
    """The largest principal angle between the middle block and its first iterate, over layers, sides and time."""
    middles = (layer["middle"][side] for layer in record["layers"].values() for side in SIDES)
    return max(each for middle in middles if middle for each in middle if each is not None)


def plot(runs: list[PlainSettings], results: Results, file: Path) -> Path:
    """The first layer: its singular values, how far they turn with and without whitened data, and all deviations."""
    records = results.records(runs)
    first, rank, d = records[0], records[0]["settings"]["rank"], records[0]["settings"]["d"]
    unwhitened = [record for record in records if not record["settings"]["whitened"]]
    figure, axes = panels(2, 2, width=5.5, height=3.9)
    _draw_values(axes[0][0], first)
    axes[0][0].set_title(f"Singular values of the first layer: {d - 2 * rank} of {d} move as one")
    _draw_angles(axes[0][1], first)
    axes[0][1].set_title(f"Their vectors: the {d - 2 * rank} span one space, which stays")
    if unwhitened:
        _draw_angles(axes[1][0], unwhitened[0])
        axes[1][0].set_title(f"For {unwhitened[0]['settings']['samples']} random samples it turns")
    axes[1][0].set_visible(bool(unwhitened))
    _draw_deviations(axes[1][1], records)
    legend_below(figure, 3, [axes[0][0], axes[0][1]])
    headline(figure, f"Which directions of a deep linear network move? Target of rank {rank}, width {d}")
    return save(figure, file)


def _draw_values(axis: Axes, record: dict[str, Any]) -> None:
    values, rank = torch.tensor(record["layers"]["W_1"]["singular_values"]), record["settings"]["rank"]
    for part, color in ((slice(rank, -rank), GREY), (slice(0, rank), COLOURS[1]), (slice(-rank, None), COLOURS[0])):
        axis.plot(record["step"], values[:, part], color=color, linewidth=1.4)
    axis.plot(record["step"], record["rho"], "k--", linewidth=1.4, label="known in advance: ρ(t)")
    axis.set(xlabel="iterations of gradient descent", ylabel="singular value")


def _draw_angles(axis: Axes, record: dict[str, Any]) -> None:
    """Right vectors. Single vectors of the middle are arbitrary, so it is drawn as one block."""
    layer, rank = record["layers"]["W_1"], record["settings"]["rank"]
    angles = torch.tensor([_numbers(row) for row in layer["vector_angles"]["right"]]).rad2deg()
    for part, color, words in ((slice(0, rank), COLOURS[1], "first"), (slice(-rank, None), COLOURS[0], "last")):
        lines = axis.plot(record["step"], angles[:, part], color=color, linewidth=1.4)
        lines[0].set_label(f"the {words} {rank}, each")
    if layer["middle"]["right"]:
        middle = torch.tensor(_numbers(layer["middle"]["right"])).rad2deg()
        count = record["settings"]["d"] - 2 * rank
        axis.plot(record["step"], middle, color=GREY, linewidth=3, label=f"the {count} between, as one block")
    axis.set(xlabel="iterations of gradient descent", ylabel="turned since step 1, degrees", ylim=(-3, 93))


def _draw_deviations(axis: Axes, records: list[dict[str, Any]]) -> None:
    """A dot for each run, on a logarithmic axis."""
    words = {}
    for record in records:
        settings = record["settings"]
        parts = [] if settings["whitened"] else ["random samples"]
        parts += [f"ε = {settings['eps']:g}"] if settings["eps"] != 1 else []
        parts += ["momentum"] if settings["momentum"] else []
        parts += ["weight decay"] if settings["weight_decay"] else []
        parts += [f"{settings['rank']} outputs"] if settings["case"] == 2 else []
        words.setdefault(", ".join(parts) or "plain", []).append(max(record["deviation"]))
    axis.set(xscale="log", xlim=(1e-16, 10), xlabel="largest distance from the theory during training")
    for at, (label, deviations) in enumerate(words.items()):
        far = max(deviations) > FAR
        axis.plot(deviations, [at] * len(deviations), "o", color=COLOURS[far])
        place = {"xytext": (-9, 0) if far else (9, 0), "ha": "right" if far else "left"}
        axis.annotate(label, (max(deviations), at), textcoords="offset points", va="center", **place)
    axis.set_yticks([])
    axis.set_ylim(len(words) - 0.5, -0.5)
    axis.set_title("How far from the theory is each training?")


def _numbers(values: list[float | None]) -> list[float]:
    return [float("nan") if each is None else each for each in values]


KIND = measured("deep_linear.dynamics", measure)
