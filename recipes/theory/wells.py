"""When a random affine subspace meets a sublevel set of a quadratic well (Larsen et al. 2021, figure 5).

    python recipes/theory/wells.py [--D 1000] [--runs 10] [--output <folder>]
    python recipes/theory/wells.py --report

L = 1/2 w^T H w with a bimodal and a continuous spectrum, from a random w_0 at three distances R. Nothing is trained,
because a linear solve gives the lowest loss in a subspace. d* is the smallest d at which 90 % of the runs reach the
loss epsilon. The bound is D - sum_i r_i^2 / (R^2 + r_i^2) (equation 3.4); the limit replaces it for large D.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.lab import command
from recipes.lab.measurement import Parser, at_least, measured
from recipes.lab.results import digits, read_measurement
from recipes.reports.figures import COLOURS, GREY, headline, legend_below, panels, save
from recipes.reports.tables import markdown
from subspace_peft.landscape import local_dimension_bound, local_dimension_limit, radii, random_lowest_losses


DISTANCES = (0.5, 1.0, 2.0)  # R
EPSILON = torch.logspace(-5, 0, 101, dtype=torch.float64)
DELTA = 0.1
WORDS = {"bimodal": "Half the directions flat, half steep", "continuous": "All curvatures between"}
"""The spectra, for those who have not read the paper."""
FOLDER = Path(__file__).parent
SMALLEST = 1e-3


def bimodal(D: int) -> Tensor:
    """The spectrum of which the first half of the directions is long."""
    return torch.where(torch.arange(D) < D // 2, SMALLEST, 1.0).double()


def continuous(D: int) -> Tensor:
    """The spectrum of evenly spaced logarithms, from long directions to short ones."""
    return torch.logspace(0, 1, D, base=SMALLEST, dtype=torch.float64).flip(0)


SPECTRA: dict[str, Callable[[int], Tensor]] = {"bimodal": bimodal, "continuous": continuous}


def measure(D: int, runs: int, seed: int) -> dict[str, Any]:
    """The lowest losses from a w_0 of norm 1, [runs, d] for each spectrum; a w_0 of norm R gives R^2 times these."""
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
    rounded = {name: digits(losses, 5) for name, losses in lowest.items()}
    return {"D": D, "runs": runs, "seed": seed, "d": d.tolist(), "lowest": rounded}


def success(record: dict[str, Any], name: str, R: float, epsilon: Tensor) -> Tensor:
    """P_s(d, epsilon, R): the share of runs that reach each loss. [d, epsilon]"""
    lowest = torch.tensor(record["lowest"][name], dtype=torch.float64)
    return (R**2 * lowest[..., None] <= epsilon).double().mean(0)


def thresholds(record: dict[str, Any], name: str, R: float, epsilon: Tensor) -> dict[str, Tensor]:
    """d* as simulated, its bound and its limit. [epsilon] each"""
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
            curves = thresholds(record, name, R, epsilon)
            for i, level in enumerate(epsilon.tolist()):
                rows.append([name, R, f"{level:g}", *(f"{d[i].item():.0f}" for d in curves.values())])
    return "\n".join(markdown(["spectrum", "R", "ε", "d*, simulated", "bound (3.4)", "large D"], rows))


def tables() -> dict[str, str]:
    """What the committed results say, for the README."""
    return {"": text(read_measurement(FOLDER / "wells.jsonl"))}


def plot(record: dict[str, Any], file: Path) -> Path:
    """A row for each spectrum: the success map of R = 1, and d* of all three distances with bound and limit."""
    figure, axes = panels(len(SPECTRA), 2, width=5.5, height=3.9, sharex=True)
    for row, name in zip(axes, SPECTRA, strict=True):
        P = success(record, name, 1.0, EPSILON)
        mesh = row[0].pcolormesh(record["d"], EPSILON.numpy(), P.T.numpy(), cmap="gray_r", vmin=0, vmax=1)
        bar = figure.colorbar(mesh, ax=row[0], label="subspaces that reach it", ticks=[0, 0.5, 1])
        bar.ax.set_yticklabels(["none", "half", "all"])
        row[0].grid(visible=False)
        row[0].set_title(f"{WORDS[name]}, start at distance 1")
        for R, color in zip(DISTANCES, COLOURS, strict=False):
            _draw_thresholds(row[1], thresholds(record, name, R, EPSILON), color, f"start at distance {R:g}")
        row[1].set(xlim=(0, record["D"]), title=f"Reached by {100 * (1 - DELTA):.0f} % of the subspaces")
        for axis in row:
            axis.set(yscale="log", ylabel="loss to be reached, ε", ylim=(EPSILON[0].item(), EPSILON[-1].item()))
    for axis in axes[-1]:
        axis.set_xlabel(f"dimensions of a random subspace, of {record['D']}")
    for dash, words in (("--", "dashed: the paper's bound (3.4)"), (":", "dotted: limit for many dimensions")):
        axes[0][1].plot([], [], dash, color=GREY, label=words)
    legend_below(figure, 3, axes[0][1:])
    headline(figure, "When does a random subspace of a quadratic well reach a low loss?")
    return save(figure, file)


def _draw_thresholds(axis: Axes, curves: dict[str, Tensor], color: str, label: str) -> None:
    for (name, d), dash in zip(curves.items(), ("-", "--", ":"), strict=True):
        words = label if name == "simulated" else None
        axis.plot(d.numpy(), EPSILON.numpy(), dash, color=color, linewidth=1.6, label=words)


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(__doc__, FOLDER)
    parser.add_argument("--D", type=at_least(2), default=1000)
    parser.add_argument("--runs", type=at_least(1), default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    record = measured(
        options.output / "wells.jsonl", options.report, lambda: measure(options.D, options.runs, options.seed)
    )
    print(text(record))
    print(plot(record, options.output / "plots" / "wells.png"))


if __name__ == "__main__":
    command.run(main)
