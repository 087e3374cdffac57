"""Gaussian widths, local angular dimensions and Gordon's bound, measured (Larsen et al. 2021, sections 3 and B.1).

    python recipes/theory/dimensions.py [--D 1000] [--draws 1000] [--runs 200] [--output <folder>]
    python recipes/theory/dimensions.py --plot

Widths of ellipsoids by Monte Carlo, beside the bounds of lemma B.1. Then the sublevel sets of two quadratic wells,
from one random w_0 at distance R = 1 from the minimum (all depends on epsilon / R^2 only): the local angular dimension
by Monte Carlo, its bound (equation 3.4) and its limit for large D, beside the dimensions that random subspaces need to
meet the set, by a linear solve; and the share of the subspaces that miss it, beside Gordon's bound.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.lab import environment
from recipes.reports.dimension import markdown
from recipes.reports.figures import save
from recipes.theory.spectra import SMALLEST, SPECTRA
from subspace_peft.landscape import (
    ellipsoid_support,
    ellipsoid_width_bounds,
    escape_probability,
    gaussian_width,
    local_angular_dimension,
    local_dimension_bound,
    local_dimension_limit,
    lowest_losses,
    radii,
)


EPSILON = (1e-5, 1e-4, 1e-3, 1e-2, 5e-2)
FOLDER = Path(__file__).parent


def ellipsoids(D: int) -> dict[str, Tensor]:
    """Semi-axes, the longest 1."""
    return {
        "ball": torch.ones(D).double(),
        **{name: (SMALLEST / spectrum(D)).sqrt() for name, spectrum in SPECTRA.items()},
        "one axis": torch.cat([torch.ones(1), torch.full((D - 1,), 1e-3)]).double(),
    }


def widths(D: int, draws: int) -> list[dict[str, Any]]:
    rows = []
    for name, r in tqdm(ellipsoids(D).items(), desc="widths"):
        width = gaussian_width(ellipsoid_support(r), D, 10 * draws)
        low, high = ellipsoid_width_bounds(r)
        square = {"square": width.value**2, "error": 2 * width.value * width.error}
        rows.append({"ellipsoid": name, "low": low.item(), "high": high.item(), **square})
    return rows


def needed(eigenvalues: Tensor, w_0: Tensor, runs: int, seed: int) -> Tensor:
    """The least d at which each run reaches each epsilon. [runs, epsilon]"""
    D, generator = len(eigenvalues), torch.Generator().manual_seed(seed)
    rows = []
    for _ in tqdm(range(runs), desc="subspaces", unit="run"):
        A = torch.randn(D, D, generator=generator, dtype=torch.float64)
        lowest = lowest_losses(eigenvalues, w_0, A)
        rows.append((lowest[:, None] <= torch.tensor(EPSILON)).double().argmax(0))
    return torch.stack(rows)


def angles(D: int, draws: int, runs: int, seed: int) -> list[dict[str, Any]]:
    rows = []
    for name, spectrum in SPECTRA.items():
        eigenvalues = spectrum(D)
        w_0 = torch.randn(D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        w_0 /= w_0.norm()
        dimensions = needed(eigenvalues, w_0, runs, seed + 1)
        for i, epsilon in enumerate(tqdm(EPSILON, desc=name)):
            r = radii(eigenvalues, epsilon)
            local = local_angular_dimension(r, w_0, draws, seed + 2)
            rows.append(
                {
                    "spectrum": name,
                    "epsilon": epsilon,
                    "local": local.value,
                    "error": local.error,
                    "bound": local_dimension_bound(r, 1.0).item(),
                    "limit": local_dimension_limit(r, 1.0).item(),
                    "needed": dimensions[:, i].tolist(),
                }
            )
    return rows


def text(record: dict[str, Any]) -> str:
    D, rows = record["D"], []
    for row in record["widths"]:
        printed = math.sqrt(2 / math.pi) * row["high"]
        width = f"{row['square']:.4g} ± {row['error']:.2g}"
        rows.append([row["ellipsoid"], width, f"{row['low']:.4g}", f"{printed:.4g}", f"{row['high']:.4g}"])
    lines = markdown(["ellipsoid", "w²", "2/π Σ r²", "√(2/π) Σ r², as printed", "Σ r²"], rows)
    rows = []
    for row in record["angles"]:
        low, median, high = np.quantile(row["needed"], [0.1, 0.5, 0.9])
        rows.append(
            [row["spectrum"], f"{row['epsilon']:g}"]
            + [f"{row['local']:.1f} ± {row['error']:.1f}", f"{row['bound']:.1f}", f"{row['limit']:.1f}"]
            + [f"{D - row['local']:.0f}", f"{median:.0f} ({low:.0f} to {high:.0f})", f"{D - row['bound']:.0f}"]
        )
    header = ["spectrum", "ε/R²", "d_local", "bound (3.4)", "large D"]
    header += ["D − d_local", "d needed: median (10 to 90 %)", "D − bound"]
    return "\n".join([*lines, "", *markdown(header, rows)])


def plot(record: dict[str, Any], file: Path) -> Path:
    """The probability of missing the set and Gordon's bound, a panel for each spectrum."""
    D = record["D"]
    d = np.arange(D + 1)
    figure, axes = plt.subplots(1, len(SPECTRA), figsize=(12.8, 4.4), sharey=True, layout="constrained")
    for axis, name in zip(axes, SPECTRA, strict=True):
        for row in (row for row in record["angles"] if row["spectrum"] == name):
            missed = (np.array(row["needed"])[:, None] > d).mean(0)
            (curve,) = axis.plot(d, missed, label=f"ε/R² = {row['epsilon']:g}")
            bound = [escape_probability(D, n, math.sqrt(row["local"])) for n in range(D + 1)]
            axis.plot(d, np.where(np.array(bound) > 0, bound, np.nan), "--", color=curve.get_color())
            axis.axvline(D - row["local"], linestyle=":", linewidth=1, color=curve.get_color())
        axis.set(xlabel="d", title=f"{name} spectrum, D = {D}")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("probability of missing S(ε)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", title="measured;\ndashed: Gordon,\ndotted: D − d_local")
    return save(figure, file)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--D", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=FOLDER)
    parser.add_argument("--plot", action="store_true", help="tables and figure from the results that are there")
    options = parser.parse_args(arguments)
    file = options.output / "results" / "dimensions.json"
    if not options.plot:
        settings = {key: getattr(options, key) for key in ("D", "draws", "runs", "seed")}
        found = {
            "widths": widths(options.D, options.draws),
            "angles": angles(options.D, options.draws, options.runs, options.seed),
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings | found | environment.record()) + "\n")
    record = json.loads(file.read_text())
    print(text(record))
    print(plot(record, options.output / "plots" / "gordon.png"))


if __name__ == "__main__":
    main()
