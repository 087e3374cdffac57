"""A step of P-BFGS and of P+-BFGS beside a step of SGD on the whole network; the methods take turns.

    python recipes/speed/optimiser.py [--rounds 30] [--threads 2] [--network lenet] [--batch 1024] [--output <folder>]
    python recipes/speed/optimiser.py --report

A network of recipes.tasks on random images; P has d = 40 random orthonormal columns over all its weights. The cost of
a step beyond its trials is its time less that of one forward of the wrapped network for each trial, measured in the
same round. The methods take turns, so that other work on the machine slows all of them alike; the load is kept beside
the medians.
"""

import gc
import statistics
import sys
import time
from pathlib import Path

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.lab import command
from recipes.lab.measurement import at_least
from recipes.lab.results import read_measurement
from recipes.reports.tables import markdown
from recipes.speed.record import FOLDER, measured, parser
from recipes.tasks.models import CLASSES, SHAPES, build, check
from subspace_peft import SubspaceConfig
from subspace_peft.adapter.full_space import full_space
from subspace_peft.optim import PBFGS, PPlusBFGS


D_SMALL = 40
TARGET = 1.3
"""Most that a step may cost beyond its trials, in steps of SGD."""
METHODS = ("sgd", "forward", "pbfgs same_batch", "pbfgs next_batch", "pplus same_batch", "pplus next_batch")


def wrapped(network: nn.Module) -> tuple[nn.Module, nn.Parameter]:
    """The network in a random subspace, and theta_d."""
    D = sum(p.numel() for p in network.parameters())
    basis = torch.linalg.qr(torch.randn(D, D_SMALL, generator=torch.Generator().manual_seed(0))).Q
    config = SubspaceConfig(projection="basis", basis=basis, target_modules="all", normalization="columns")
    model = get_peft_model(network, config)
    (theta_d,) = (p for p in model.parameters() if p.requires_grad)
    return model, theta_d


class Contender:
    """One method that trains its own copy of the network."""

    def __init__(self, method: str, network: str, dataset: str, images: Tensor, labels: Tensor):
        self.images, self.labels = images, labels
        self.model, self.optimizer, self.theta_d = build(network, dataset).train(), None, None
        name, _, curvature = method.partition(" ")
        if name == "sgd":
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        else:
            self.model, self.theta_d = wrapped(self.model)
        if name == "pbfgs":
            self.optimizer = PBFGS([self.theta_d], curvature=curvature)
        elif name == "pplus":
            self.optimizer = PPlusBFGS([self.theta_d], *full_space(self.model), curvature=curvature)
        self.wall: list[float] = []
        self.trials: list[int] = []

    def closure(self) -> Tensor:
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        loss = cross_entropy(self.model(self.images), self.labels)
        if torch.is_grad_enabled():
            loss.backward()
        return loss

    def step(self) -> None:
        start = time.perf_counter()
        if self.optimizer is None:
            with torch.no_grad():
                self.closure()
        else:
            self.optimizer.step(self.closure)
        self.wall.append(time.perf_counter() - start)
        searched = self.optimizer is not None and self.theta_d is not None
        self.trials.append(self.optimizer.state[self.theta_d]["trials"] if searched else 0)

    def result(self, sgd: "Contender", forward: "Contender") -> dict:
        """`of_sgd`: the whole step; `beyond_trials`: less a forward for each trial; in steps of SGD."""
        rounds = list(zip(self.wall, self.trials, sgd.wall, forward.wall, strict=True))
        quartiles = statistics.quantiles(self.wall, n=4)
        return {
            "wall_ms": round(1e3 * statistics.median(self.wall), 1),
            "wall_quartiles_ms": [round(1e3 * quartiles[0], 1), round(1e3 * quartiles[2], 1)],
            "trials": round(statistics.mean(self.trials), 2),
            "of_sgd": round(statistics.median(mine / theirs for mine, _, theirs, _ in rounds), 3),
            "beyond_trials": round(statistics.median((mine - n * f) / theirs for mine, n, theirs, f in rounds), 3),
        }


def measure(network: str, dataset: str, batch: int, rounds: int, warm_up: int) -> dict[str, dict]:
    torch.manual_seed(0)
    images, labels = torch.rand(batch, *SHAPES[dataset]), torch.randint(CLASSES[dataset], (batch,))
    contenders = {method: Contender(method, network, dataset, images, labels) for method in METHODS}
    gc.collect()
    gc.disable()  # a collection would slow the method that steps when it comes
    for at in tqdm(range(rounds + warm_up), unit="round"):
        for contender in contenders.values():
            if at == warm_up:
                contender.wall.clear()
                contender.trials.clear()
            contender.step()
    gc.enable()
    return {method: c.result(contenders["sgd"], contenders["forward"]) for method, c in contenders.items()}


def text(results: dict[str, dict]) -> str:
    rows = []
    for method, r in results.items():
        beyond = f"{r['beyond_trials']:.2f}" if r["trials"] else "-"
        rows.append([method, f"{r['wall_ms']:.0f}", f"{r['of_sgd']:.2f}", f"{r['trials']:.1f}", beyond])
    header = ["method", "ms a step", "of SGD's step", "trials a step", "beyond the trials, of SGD's step"]
    return "\n".join(markdown(header, rows))


def tables() -> dict[str, str]:
    """What the committed results say, for the README."""
    return {"": text(read_measurement(FOLDER / "optimiser.jsonl")["methods"])}


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=at_least(2), default=30)
    options.add_argument("--warm-up", type=at_least(0), default=5)
    options.add_argument("--network", default="lenet")
    options.add_argument("--dataset", choices=SHAPES, default="mnist", help="gives the shape; the pixels are random")
    options.add_argument("--batch", type=at_least(1), default=1024)
    chosen = options.parse_args(arguments)
    check(chosen.network)
    network, dataset, batch, rounds = chosen.network, chosen.dataset, chosen.batch, chosen.rounds
    settings = {
        "model": {"network": network, "dataset": dataset, "batch": batch, "d": D_SMALL},
        "rounds": rounds,
        "target_beyond_trials": TARGET,
    }
    record = measured(
        "optimiser", chosen, lambda: settings | {"methods": measure(network, dataset, batch, rounds, chosen.warm_up)}
    )
    print(text(record["methods"]))


if __name__ == "__main__":
    command.run(main)
