"""When two random affine subspaces meet: never below D - n dimensions, always from there on (Larsen et al. 2021, B.3).

    python recipes/theory/affine.py [--D 200] [--runs 100] [--output <folder>]

The target B has n dimensions, the training subspace d, and their distance is measured by least squares; it is in units
of the distance between a point that each goes through, which is therefore of no account. The formula is
sqrt((D - n - d) / D).
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.lab import environment
from recipes.reports.dimension import markdown
from subspace_peft.landscape import affine_distance, affine_threshold


FOLDER = Path(__file__).parent
TOLERANCE = 1e-9


def distance(D: int, n: int, d: int, generator: torch.Generator) -> float:
    """Between random subspaces of n and d dimensions through two random points, over that of these points."""
    both, offset = (torch.randn(D, m, generator=generator, dtype=torch.float64) for m in (n + d, 1))
    Q = torch.linalg.qr(both).Q  # of the span of both: what is left of the offset is the distance
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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--D", type=int, default=200)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=FOLDER)
    options = parser.parse_args(arguments)
    rows = measure(options.D, options.runs, options.seed)
    record = {"D": options.D, "runs": options.runs, "seed": options.seed, "rows": rows}
    file = options.output / "results" / "affine.json"
    environment.write(file, record)
    print(text(record))


if __name__ == "__main__":
    main()
