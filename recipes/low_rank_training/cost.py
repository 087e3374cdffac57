"""The cost of a training step of the MLP: normal, and with the hidden layer as B A of inner width 2r or r.

    python recipes/low_rank_training/cost.py [--rank 20 2 10 1] [--steps 30] [--output <folder>]
    python recipes/low_rank_training/cost.py --report

Each inner width has two rows: the adapter, which keeps the frozen base weights in memory, and the plain network of two
thinner layers that `compress` makes of it, which does not. For a batch of 128, with one thread:

- trained: the number of trained parameters
- flops: of a step, forward and backward, as torch counts them: matrix products, a multiply-add as two
- held: bytes between steps: weights and Adam's two moments
- peak: these and the most that a step allocates besides: activations, gradients, temporaries
- wall, cpu: the time of a step; the CPU time depends less on other work on the machine
"""

import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.lab import command
from recipes.lab.measurement import Parser, at_least, measured, with_load
from recipes.lab.results import read_measurement
from recipes.reports.tables import markdown
from recipes.tasks.models import CLASSES, SHAPES, build, check
from recipes.training.settings import Settings
from recipes.training.train import wrap
from subspace_peft import compress


BATCH = 128
EPOCH = 60_000  # images of MNIST
MIB = 2**20


def network(model: str, dataset: str, rank: int, plain: bool) -> nn.Module:
    """The normal network for rank 0; else hidden layers as products: of an adapter, or of a plain network."""
    if not rank:
        return build(model, dataset)
    settings = Settings(dataset=dataset, model=model, projection="identity", rank=rank, start="orthogonal")
    wrapped = wrap(build(model, dataset), settings)
    return compress(wrapped).requires_grad_() if plain else wrapped


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of weights, trained or not, and of the optimiser's state."""

    def tensors() -> Iterator[Tensor]:
        yield from itertools.chain(model.parameters(), model.buffers())
        for state in optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))

    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors()}.values())


def allocated(step: Callable[[], None]) -> int:
    """The most bytes of its own allocations that a step holds at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes))


def measure(model: nn.Module, shape: tuple[int, ...], classes: int, steps: int) -> dict[str, float]:
    images, labels = torch.rand(BATCH, *shape), torch.randint(0, classes, (BATCH,))
    parameters = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)

    def step() -> None:
        cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # allocates the moments of Adam, and loads libraries
    wall, cpu = [], []
    for _ in range(steps):
        at = time.perf_counter(), time.process_time()
        step()
        wall.append(time.perf_counter() - at[0])
        cpu.append(time.process_time() - at[1])
    between = held(model, optimizer)
    with FlopCounterMode(display=False) as counter:
        step()
    return {
        "trained": sum(p.numel() for p in parameters),
        "flops": counter.get_total_flops(),
        "held_mib": round(between / MIB, 2),
        "peak_mib": round((between + allocated(step)) / MIB, 2),
        "wall_ms": round(1e3 * statistics.median(wall), 1),
        "cpu_ms": round(1e3 * statistics.median(cpu), 1),
    }


def costs(model: str, dataset: str, ranks: list[int], steps: int) -> list[dict]:
    """One row for each method."""
    torch.set_num_threads(1)
    rows = []
    for rank, plain in tqdm([(0, False), *itertools.product(ranks, (False, True))], unit="method"):
        result = measure(network(model, dataset, rank, plain), SHAPES[dataset], CLASSES[dataset], steps)
        rows.append({"rank": rank, "plain": plain} | result)
    return rows


def text(rows: list[dict]) -> str:
    header = ["method", "inner width", "parameters trained", "GFLOP a step", f"TFLOP for {EPOCH:,} images"]
    header += ["held, MiB", "peak, MiB", "ms a step", "CPU ms a step"]
    cells = []
    for row in rows:
        words = "normal" if not row["rank"] else "compressed" if row["plain"] else "adapter"
        step, epoch = row["flops"] / 1e9, row["flops"] / BATCH * EPOCH / 1e12
        measured = [f"{row[key]:.0f}" for key in ("held_mib", "peak_mib", "wall_ms", "cpu_ms")]
        cells.append([words, row["rank"] or "", f"{row['trained']:,}", f"{step:.3f}", f"{epoch:.3f}", *measured])
    return "\n".join(markdown(header, cells))


def tables() -> dict[str, str]:
    """What the committed results say, for the README."""
    return {"": text(read_measurement(Path(__file__).parent / "cost.jsonl")["methods"])}


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(__doc__, Path(__file__).parent)
    parser.add_argument("--rank", nargs="+", type=at_least(1), default=[20, 2, 10, 1], help="inner widths")
    parser.add_argument("--steps", type=at_least(1), default=30)
    parser.add_argument("--model", default="mlp")
    parser.add_argument("--dataset", choices=SHAPES, default="mnist", help="gives the shape; the pixels are random")
    options = parser.parse_args(arguments)
    model, dataset, steps = options.model, options.dataset, options.steps
    check(model)
    settings = {"model": model, "dataset": dataset, "batch": BATCH, "steps": steps}
    record = measured(
        options.output / "cost.jsonl",
        options.report,
        lambda: settings | with_load(lambda: {"methods": costs(model, dataset, options.rank, steps)}),
    )
    print(text(record["methods"]))


if __name__ == "__main__":
    command.run(main)
