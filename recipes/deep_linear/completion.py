"""Deep matrix factorisation and completion: the whole network, the compressed one, a narrow one (Qu 2023).
    python recipes/run.py recipes/deep_linear/completion.yaml

min 1/2 |Omega (W_{L:1} - Phi)|_F^2 by gradient descent from an eps-orthogonal start, Phi [d, d] of rank r, of which
the share `seen` is seen (1: factorisation). "whole" has L weights of [d, d]; "compressed" U W~_L ... W~_1 V^T starts
from the invariant subspace of that same network, W~_l [2r, 2r], and moves U and V at `gamma` times the rate; "narrow"
has weights of `width`. The error is |W_{L:1} - Phi|_F / |Phi|_F over all entries, seen or not.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recipes.deep_linear.networks import compressed, descend, product, start
from recipes.lab.kinds import measured
from recipes.lab.results import Results, digits
from recipes.lab.settings import PlainSettings
from recipes.reports.figures import COLOURS, count, headline, legend_below, panels, save
from recipes.reports.tables import markdown


LEVELS = (1e-1, 1e-2, 1e-3)


def problem(settings: PlainSettings, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Phi = A B^T of Gaussian factors, of norm 1, and Omega, independent entries. [d, d]"""
    d, r = settings["d"], settings["rank"]
    A, B = torch.randn(2, d, r, generator=generator, dtype=torch.float64)
    Phi = A @ B.mT
    seen = torch.rand(d, d, generator=generator, dtype=torch.float64) < settings["seen"]
    return Phi / torch.linalg.matrix_norm(Phi, 2), seen.double()


def measure(settings: PlainSettings) -> dict[str, Any]:
    device = settings.get("device", "cpu")
    d, L, eps, network = (settings[key] for key in ("d", "depth", "eps", "network"))
    Phi, seen = problem(settings, torch.Generator().manual_seed(settings["seed"]))
    width = d if network == "compressed" else settings.get("width", d)
    generator = torch.Generator().manual_seed(1000 + settings["seed"])  # of the start alone: one for all kinds
    weights, rates = start([d] + [width] * (L - 1) + [d], "orthogonal", eps, generator), None
    if network == "compressed":
        weights = compressed(weights, seen * Phi, settings["estimate"], eps)
        rates = [settings["gamma"], *[1.0] * L, settings["gamma"]]
    Phi, seen, weights = Phi.to(device), seen.to(device), [w.to(device) for w in weights]
    curve = {"step": [], "seconds": [], "loss": [], "error": []}

    def watch(step: int, seconds: float, loss: float) -> None:
        error = ((product(weights) - Phi).norm() / Phi.norm()).item()
        for key, value in zip(curve, (step, seconds, loss, error), strict=True):
            curve[key].append(value)

    descent = descend(
        weights, lambda w: (seen * (product(w) - Phi)).square().sum() / 2, settings["lr"], settings["iterations"],
        settings["every"], watch, rates, tolerance=settings["tolerance"] * settings["seen"], name=network,
    )  # fmt: skip
    return {
        "parameters": sum(w.numel() for w in weights),
        "iterations": descent.iterations,
        "converged": descent.loss <= settings["tolerance"] * settings["seen"],
        "seconds": round(descent.seconds, 2),
        "error": digits(curve["error"][-1]),
        "curve": {key: each if key == "step" else digits(each) for key, each in curve.items()},
    }


def reached(run: dict[str, Any], level: float) -> tuple[int, float] | None:
    """Iterations and seconds to the first recorded error below a level."""
    curve = run["curve"]
    at = next((i for i, error in enumerate(curve["error"]) if error <= level), None)
    return None if at is None else (curve["step"][at], curve["seconds"][at])


def label(settings: PlainSettings) -> str:
    if settings["network"] == "compressed":
        return f"compressed, 2r̂ = {2 * settings['estimate']}, γ = {settings['gamma']:g}"
    return f"{settings['network']}, width {settings.get('width', settings['d'])}"


def _network(settings: dict[str, Any]) -> str:
    """The label in words."""
    if settings["network"] != "compressed":
        words = {"whole": "the whole network", "narrow": "a narrow network, random start"}[settings["network"]]
        return f"{words}, width {settings.get('width', settings['d'])}"
    outer = f"outer layers at {settings['gamma']:g} of the rate" if settings["gamma"] else "outer layers fixed"
    return f"compressed to width {2 * settings['estimate']}, {outer}"


def text(runs: list[PlainSettings], results: Results) -> str:
    """Iterations and seconds to each error, seeds apart by semicolons."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for record in results.records(runs):
        settings = record["settings"]
        groups.setdefault((label(settings), settings["d"], settings["seen"]), []).append(record)
    rows = []
    for (words, d, seen), records in groups.items():
        cells = ["; ".join(_cost(reached(record, level)) for record in records) for level in LEVELS]
        last = [
            f"{record['error']:.1e} after {_cost((record['iterations'], record['seconds']))}" for record in records
        ]
        rows.append([words, d, f"{100 * seen:g} %", f"{records[0]['parameters']:,}", *cells, "; ".join(last)])
    header = ["network", "d", "seen", "parameters", *(f"error {level:g}" for level in LEVELS), "at the end"]
    return "\n".join(markdown(header, rows))


def _cost(at: tuple[int, float] | None) -> str:
    return "-" if at is None else f"{at[0]:,} its, {at[1]:.1f} s"


def plot(runs: list[PlainSettings], results: Results, file: Path) -> Path:
    """The error over iterations and over seconds, of the first seed."""
    records = results.records(runs)
    shown = [record for record in records if record["settings"]["seed"] == records[0]["settings"]["seed"]]
    settings = shown[0]["settings"]
    figure, axes = panels(1, 2, width=5.5, height=4.2, sharey=True)
    units = {"step": "iterations of gradient descent", "seconds": "seconds of one core"}
    for axis, (key, unit) in zip(axes[0], units.items(), strict=True):
        for at, record in enumerate(shown):
            wide = record["settings"]["network"] == "whole"  # the compressed one may lie on top
            words = f"{_network(record['settings'])}: {count(record['parameters'])} parameters"
            color = COLOURS[at] if not wide else "#bbbbbb"
            width = 5 if wide else 1.8
            axis.plot(record["curve"][key], record["curve"]["error"], color=color, label=words, linewidth=width)
        axis.set(yscale="log", xlabel=unit)
    longest = max(record["seconds"] for record in shown)
    axes[0][1].set(xscale="log", xlim=(longest / 50, 1.3 * longest))
    axes[0][0].set_ylabel("relative error, all entries")
    seen = "all entries seen" if settings["seen"] == 1 else f"{100 * settings['seen']:g} % of the entries seen"
    size = f"{settings['d']} x {settings['d']}, rank {settings['rank']}, {seen}"
    headline(figure, f"Can a small network stand in for a large one? {size}")
    legend_below(figure, columns=2)
    return save(figure, file)


KIND = measured("deep_linear.completion", measure)
