"""How far operators are from isometries: the published "FastJL", our FastJL, Fastfood and Kronecker.

    python recipes/speed/distortion.py [--d 100 509 ...] [--output <folder>]
    python recipes/speed/distortion.py --report

The published operator (Gargiulo 2023; the code, which differs from the report) is, for each tensor,

    theta_D[i] = theta_0[i] + p_i u[i mod k] / K,    u = H_k (signs * theta_d),    k = 2^ceil(log2 d)

with p_i = 0 with probability 1 - q, else normal of standard deviation q^(-1/3), q = min(2 ln(60000)^2 / ln(d)^3, 1),
and K = sqrt(d) for d <= 6000, else ln(d). It is written here after that formula; the code's transform, of length
2^ceil(log2 D), repeats this one.

Measured on one tensor, a matrix of n entries: the share of zero rows of P, whose weights never move, and the norms of
rows and columns of P. "scale" is the mean column norm over sqrt(n / d), which independent entries of variance 1 / d
would have: where it changes from one d to the next, the effective learning rate changes too. "rank one" is the
standard deviation of |P^T g|^2 over seeds and gradients g of rank one, relative to its mean and to sqrt(2 / d), that
of independent normals.
"""

import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.lab import command
from recipes.lab.measurement import at_least
from recipes.lab.results import read_measurement
from recipes.reports.tables import markdown
from recipes.speed.record import FOLDER, measured, parser
from subspace_peft.projections import PROJECTIONS, TensorRows
from subspace_peft.projections.hadamard import hadamard, next_power_of_two


SHAPE = (512, 384)
N = SHAPE[0] * SHAPE[1]
DIMENSIONS = (100, 509, 510, 1000, 4000, 6000, 6001, 10_000, 50_000)
PROBES = 64
SEEDS = 24
GRADIENTS = 4  # of rank one, for each seed
OPERATORS = ("published", "fastjl", "fastfood", "kronecker")


class Published:
    """The published operator, with the methods `apply` and `adjoint` of our projections."""

    def __init__(self, n: int, d: int, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.n, self.d, self.k = n, d, next_power_of_two(d)
        q = min(2 * math.log(60_000) ** 2 / math.log(d) ** 3, 1)
        moves = torch.rand(n, generator=generator) < q
        self.p = torch.randn(n, generator=generator) * q ** (-1 / 3) * moves
        self.p /= math.sqrt(d) if d <= 6000 else math.log(d)
        self.signs = 2.0 * torch.randint(0, 2, (d,), generator=generator) - 1
        self.moved = int(moves.sum())

    def apply(self, z: Tensor) -> Tensor:
        u = hadamard(torch.nn.functional.pad(z * self.signs, (0, self.k - self.d)))
        return self.p * u.repeat(*[1] * (z.dim() - 1), -(-self.n // self.k))[..., : self.n]

    def adjoint(self, g: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(g * self.p, (0, -self.n % self.k))
        return hadamard(padded.unflatten(-1, (-1, self.k)).sum(-2))[..., : self.d] * self.signs


def rows_and_columns(operator, n: int, d: int) -> tuple[Tensor, Tensor]:
    """Norms of PROBES rows and of PROBES columns of P, evenly spaced."""
    i = torch.linspace(0, n - 1, PROBES).long()
    j = torch.linspace(0, d - 1, PROBES).long()
    rows = torch.stack([operator.adjoint(torch.nn.functional.one_hot(at, n).float()).norm() for at in i])
    columns = torch.stack([operator.apply(torch.nn.functional.one_hot(at, d).float()).norm() for at in j])
    return rows, columns


def made(name: str, d: int, seed: int = 0):
    if name == "published":
        return Published(N, d, seed)
    return PROJECTIONS[name](TensorRows(name="weight", n=N, d=d, shape=SHAPE, seed=seed))


def spread_of_rank_one(name: str, d: int) -> float:
    """The standard deviation of |P^T g|^2 over seeds and g of rank one, relative to its mean times sqrt(2 / d)."""
    left, right = torch.randn(GRADIENTS, SHAPE[0], 1), torch.randn(GRADIENTS, 1, SHAPE[1])
    g = (left @ right).flatten(1)
    squares = torch.stack([made(name, d, seed).adjoint(g).square().sum(1) for seed in range(SEEDS)]) / g.square().sum(
        1
    )
    return (squares.std() / squares.mean() * math.sqrt(d / 2)).item()


def measure(name: str, d: int) -> dict:
    operator, factor = made(name, d), 1.0
    if name != "published":
        factor = math.sqrt(operator.moved / operator.column_square_norms().sum().item())  # normalization="rows"
    with torch.no_grad():
        rows, columns = rows_and_columns(operator, N, d)
        image = torch.stack([operator.apply(torch.randn(d)) for _ in range(8)])
    rows, columns = rows * factor, columns * factor
    moving = rows[rows > 0]
    return {
        "operator": name,
        "d": d,
        "never_moved": 1 - operator.moved / N,
        "never_moved_seen": (image == 0).all(0).double().mean().item(),
        "scale": (columns.mean() / math.sqrt(N / d)).item(),
        "column_norms_max_over_min": (columns.max() / columns.min()).item(),
        "row_norms_sd_over_mean": (moving.std() / moving.mean()).item(),
        "rank_one": spread_of_rank_one(name, d),
    }


def text(results: list[dict]) -> str:
    header = ["d", "operator", "never moved", "scale", "column norms, max / min", "row norms, sd / mean", "rank one"]
    rows = [
        [f"{r['d']:,}", r["operator"], f"{100 * r['never_moved']:.0f} %", f"{r['scale']:.2f}"]
        + [f"{r['column_norms_max_over_min']:.3f}", f"{r['row_norms_sd_over_mean']:.2f}", f"{r['rank_one']:.2f}"]
        for r in results
    ]
    return "\n".join(markdown(header, rows))


def tables() -> dict[str, str]:
    """What the committed results say, for the README."""
    return {"": text(read_measurement(FOLDER / "distortion.jsonl")["operators"])}


def operators(dimensions: list[int]) -> dict[str, Any]:
    torch.manual_seed(0)
    return {"n": N, "operators": [measure(name, d) for d in dimensions for name in OPERATORS]}


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--d", nargs="+", type=at_least(2), default=list(DIMENSIONS))
    chosen = options.parse_args(arguments)
    record = measured("distortion", chosen, lambda: operators(chosen.d))
    print(text(record["operators"]))


if __name__ == "__main__":
    command.run(main)
