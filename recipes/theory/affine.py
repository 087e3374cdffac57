"""When two random affine subspaces meet: never if d < D - n, always from there on (Larsen et al. 2021, B.3).

    python recipes/theory/affine.py [--D 200] [--runs 100] [--output <folder>]
    python recipes/theory/affine.py --report

The target has n dimensions, the training subspace d. Their distance is measured by least squares, in units of the
distance between two points that they go through; the formula is sqrt((D - n - d) / D).
"""

import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.lab import command
from recipes.lab.measurement import Parser, at_least, measured
from recipes.lab.results import read_measurement
from recipes.reports.tables import markdown
from subspace_peft.landscape import affine_distance, affine_threshold


FOLDER = Path(__file__).parent
TOLERANCE = 1e-9


def distance(D: int, n: int, d: int, generator: torch.Generator) -> float:
    """Distance of random subspaces of n and d dimensions through two random points, over that of the points."""
    both, offset = (torch.randn(D, m, generator=generator, dtype=torch.float64) for m in (n + d, 1))
    Q = torch.linalg.qr(both).Q  # spans both: the distance is the norm of the rest of the offset
    return ((offset - Q @ (Q.T @ offset)).norm() / offset.norm()).item()


def measure(D: int, runs: int, seed: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    targets = sorted({D // 20, D // 4, D // 2, 9 * D // 10})
    rows = []
    for n in tqdm(targets, unit="n"):
        threshold = affine_threshold(D, n)
        for d in sorted({threshold // 2, threshold - 1, threshold, threshold + 1} | {max(1, threshold - D // 20)}):
            distances = [distance(D, n, d, generator) for _ in range(runs)]
            meets = sum(value < TOLERANCE for value in distances) / runs
            rms = (sum(value**2 for value in distances) / runs) ** 0.5
            rows.append({"n": n, "d": d, "meets": meets, "distance": rms, "formula": affine_distance(D, n, d)})
    return rows


def text(record: dict[str, Any]) -> str:
    rows = [
        [row["n"], affine_threshold(record["D"], row["n"]), row["d"], f"{100 * row['meets']:.0f} %"]
        + [f"{row['distance']:.4f}" if row["distance"] > TOLERANCE else "0", f"{row['formula']:.4f}"]
        for row in record["rows"]
    ]
    return "\n".join(markdown(["n", "D − n", "d", "meets", "distance, rms", "formula"], rows))


def tables() -> dict[str, str]:
    """What the committed results say, for the README."""
    return {"": text(read_measurement(FOLDER / "affine.jsonl"))}


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(__doc__, FOLDER)
    parser.add_argument("--D", type=at_least(20), default=200)
    parser.add_argument("--runs", type=at_least(1), default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    settings = {key: getattr(options, key) for key in ("D", "runs", "seed")}
    record = measured(
        options.output / "affine.jsonl", options.report, lambda: settings | {"rows": measure(**settings)}
    )
    print(text(record))


if __name__ == "__main__":
    command.run(main)
