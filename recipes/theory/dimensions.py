"""Gaussian widths, local angular dimensions and Gordon's bound, measured (Larsen et al. 2021, sections 3 and B.1).

    python recipes/theory/dimensions.py [--D 1000] [--draws 1000] [--runs 200] [--output <folder>]
    python recipes/theory/dimensions.py --report

Widths of ellipsoids by Monte Carlo, beside the bounds of lemma B.1. Then the sublevel sets S(epsilon) of two quadratic
wells, seen from one random w_0 at distance R = 1 from the minimum, because everything depends on epsilon / R^2 only:

- the local angular dimension by Monte Carlo, its bound (equation 3.4) and its limit for large D
- the number of dimensions that random subspaces need to meet the set, by a linear solve
- the share of random subspaces that miss the set, beside Gordon's bound
"""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.lab import command
from recipes.lab.measurement import Parser, at_least, measured
from recipes.lab.results import read_measurement
from recipes.reports.figures import COLOURS, GREY, headline, legend_below, panels, save
from recipes.reports.tables import joined, markdown
from recipes.theory.wells import SMALLEST, SPECTRA
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
    """Semi-axes by name; the longest is 1. [D] each"""
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
    """The smallest d at which the subspace of each run meets each sublevel set. [runs, epsilon]"""
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


def parts(record: dict[str, Any]) -> dict[str, str]:
    """The tables "widths" and "angles"."""
    return {"widths": "\n".join(_widths(record)), "angles": "\n".join(_angles(record))}


def text(record: dict[str, Any]) -> str:
    return joined(parts(record))


def tables() -> dict[str, str]:
    """What the committed results say, for the README."""
    return parts(read_measurement(FOLDER / "dimensions.jsonl"))


def _widths(record: dict[str, Any]) -> list[str]:
    rows = []
    for row in record["widths"]:
        printed = math.sqrt(2 / math.pi) * row["high"]
        width = f"{row['square']:.4g} ± {row['error']:.2g}"
        rows.append([row["ellipsoid"], width, f"{row['low']:.4g}", f"{printed:.4g}", f"{row['high']:.4g}"])
    return markdown(["ellipsoid", "w²", "2/π Σ r²", "√(2/π) Σ r², as printed", "Σ r²"], rows)


def _angles(record: dict[str, Any]) -> list[str]:
    D, rows = record["D"], []
    for row in record["angles"]:
        low, median, high = np.quantile(row["needed"], [0.1, 0.5, 0.9])
        rows.append(
            [row["spectrum"], f"{row['epsilon']:g}"]
            + [f"{row['local']:.1f} ± {row['error']:.1f}", f"{row['bound']:.1f}", f"{row['limit']:.1f}"]
            + [f"{D - row['local']:.0f}", f"{median:.0f} ({low:.0f} to {high:.0f})", f"{D - row['bound']:.0f}"]
        )
    header = ["spectrum", "ε/R²", "d_local", "bound (3.4)", "large D"]
    return markdown([*header, "D − d_local", "d needed: median (10 to 90 %)", "D − bound"], rows)


def plot(record: dict[str, Any], file: Path) -> Path:
    """The probability of missing the set and Gordon's bound, a panel for each spectrum."""
    D = record["D"]
    d = np.arange(D + 1)
    figure, (axes,) = panels(1, len(SPECTRA), width=5.5, height=4.2, sharey=True)
    for axis, name in zip(axes, SPECTRA, strict=True):
        rows = [row for row in record["angles"] if row["spectrum"] == name]
        for color, row in zip(COLOURS, rows[1:-1], strict=False):  # the ends lie at the edges
            missed = (np.array(row["needed"])[:, None] > d).mean(0)
            axis.plot(d, missed, color=color, label=f"loss ε = {row['epsilon']:g} R²")
            bound = [escape_probability(D, n, math.sqrt(row["local"])) for n in range(D + 1)]
            axis.plot(d, np.where(np.array(bound) > 0, bound, np.nan), "--", color=color)
            axis.axvline(D - row["local"], linestyle=":", linewidth=1.2, color=color)
        axis.set(xlabel=f"dimensions of the random subspace, of {D}", title=f"{name} spectrum")
    axes[0].plot([], [], "--", color=GREY, label="dashed: Gordon's bound")
    axes[0].plot([], [], ":", color=GREY, label="dotted: predicted, D − d_local")
    axes[0].set_ylabel("share of subspaces that miss it")
    headline(figure, "How many dimensions until random subspaces stop missing a low loss?")
    legend_below(figure, 3)
    return save(figure, file)


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(__doc__, FOLDER)
    parser.add_argument("--D", type=at_least(2), default=1000)
    parser.add_argument("--draws", type=at_least(2), default=1000)
    parser.add_argument("--runs", type=at_least(1), default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    D, draws, runs, seed = options.D, options.draws, options.runs, options.seed
    settings = {"D": D, "draws": draws, "runs": runs, "seed": seed}
    record = measured(
        options.output / "dimensions.jsonl",
        options.report,
        lambda: settings | {"widths": widths(D, draws), "angles": angles(D, draws, runs, seed)},
    )
    print(text(record))
    print(plot(record, options.output / "plots" / "gordon.png"))


if __name__ == "__main__":
    command.run(main)
