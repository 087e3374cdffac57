"""When a random affine subspace meets a sublevel set of a quadratic well (Larsen et al. 2021, figure 5).

    python recipes/theory/wells.py [--D 1000] [--runs 10] [--output <folder>]
    python recipes/theory/wells.py --plot

L = 1/2 w^T H w with a bimodal and a continuous spectrum, from a random w_0 at three distances R. The lowest loss in a
subspace is a linear solve: nothing is trained. d* is the least d at which 90 % of the runs reach the loss epsilon; the
bound is D - sum_i r_i^2 / (R^2 + r_i^2) (equation 3.4), and the limit what replaces it for large D.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.lab import environment
from recipes.reports.dimension import markdown
from recipes.reports.figures import save
from recipes.theory.spectra import SPECTRA
from subspace_peft.landscape import local_dimension_bound, local_dimension_limit, radii, random_lowest_losses


DISTANCES = (0.5, 1.0, 2.0)  # R
EPSILON = torch.logspace(-5, 0, 101, dtype=torch.float64)
DELTA = 0.1
FOLDER = Path(__file__).parent


def measure(D: int, runs: int, seed: int) -> dict[str, Any]:
    """The lowest losses from a w_0 of norm 1, [runs, d] for each spectrum; from R they are R^2 times as much."""
    d = torch.linspace(0, D, min(D, 200) + 1).round().long()
    lowest = {
        name: torch.cat(
            [
                random_lowest_losses(spectrum(D), runs=1, seed=seed * runs + run)
                for run in tqdm(range(runs), desc=name, unit="run")
            ]
        )[:, d]
        for name, spectrum in SPECTRA.items()
    }
    digits = {name: [[float(f"{loss:.4e}") for loss in run] for run in rows.tolist()] for name, rows in lowest.items()}
    return {"D": D, "runs": runs, "seed": seed, "d": d.tolist(), "lowest": digits}


def success(record: dict[str, Any], name: str, R: float, epsilon: Tensor) -> Tensor:
    """P_s(d, epsilon, R), [d, epsilon]."""
    lowest = torch.tensor(record["lowest"][name], dtype=torch.float64)
    return (R**2 * lowest[..., None] <= epsilon).double().mean(0)


def thresholds(record: dict[str, Any], name: str, R: float, epsilon: Tensor) -> dict[str, Tensor]:
    """d* as simulated, its bound and its limit, [epsilon] each."""
    D, r = record["D"], radii(SPECTRA[name](record["D"]), epsilon)
    first = (success(record, name, R, epsilon) >= 1 - DELTA).double().argmax(0)
    return {
        "simulated": torch.tensor(record["d"])[first].double(),
        "bound": D - local_dimension_bound(r, R),
        "limit": D - local_dimension_limit(r, R),
    }


def text(record: dict[str, Any]) -> str:
    epsilon = torch.tensor([1e-4, 1e-3, 1e-2, 1e-1]).double()
    rows = []
    for name in SPECTRA:
        for R in DISTANCES:
            found = thresholds(record, name, R, epsilon)
            for i, level in enumerate(epsilon.tolist()):
                rows.append([name, R, f"{level:g}", *(f"{d[i].item():.0f}" for d in found.values())])
    return "\n".join(markdown(["spectrum", "R", "ε", "d*, simulated", "bound (3.4)", "large D"], rows))


def plot(record: dict[str, Any], file: Path) -> Path:
    """A row for each spectrum: it, the success maps of three distances, and all d* together."""
    figure, axes = plt.subplots(len(SPECTRA), len(DISTANCES) + 2, figsize=(18, 7), layout="constrained")
    for row, name in zip(axes, SPECTRA, strict=True):
        row[0].hist(SPECTRA[name](record["D"]).log10().numpy(), bins=40, color="grey")
        row[0].set(xlabel="log10 of the eigenvalue", ylabel="number", title=f"{name} spectrum")
        for axis, R, color in zip(row[1:], DISTANCES, ("tab:blue", "tab:orange", "tab:red"), strict=False):
            P = success(record, name, R, EPSILON)
            axis.pcolormesh(record["d"], EPSILON.numpy(), P.T.numpy(), cmap="gray", vmin=0, vmax=1, shading="nearest")
            axis.set(yscale="log", xlabel="d", ylabel="ε", title=f"P_s(d, ε, R = {R:g})")
            for axis_too in (axis, row[-1]):
                _draw_thresholds(axis_too, thresholds(record, name, R, EPSILON), color, f"R = {R:g}")
        row[-1].set(yscale="log", xlabel="d", ylabel="ε", title="d*", xlim=(0, record["D"]))
        row[-1].grid(alpha=0.3)
    axes[0][1].legend(fontsize="small", loc="upper right")
    return save(figure, file)


def _draw_thresholds(axis: Axes, found: dict[str, Tensor], color: str, label: str) -> None:
    for (name, d), style in zip(found.items(), ("-", "--", ":"), strict=True):
        axis.plot(d.numpy(), EPSILON.numpy(), style, color=color, linewidth=1.5, label=f"{label}, {name}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--D", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=FOLDER)
    parser.add_argument(
        "--plot", action="store_true", help="table and figure from the results that are there, no runs"
    )
    options = parser.parse_args(arguments)
    file = options.output / "results" / "wells.json"
    if not options.plot:
        record = measure(options.D, options.runs, options.seed) | environment.record()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record) + "\n")
    record = json.loads(file.read_text())
    print(text(record))
    print(plot(record, options.output / "plots" / "wells.png"))


if __name__ == "__main__":
    main()
