"""What a training step of the MLP costs: normal, and with the hidden layer as B A of inner width 2r or r.

    python recipes/low_rank_training/cost.py [--rank 20 2 10 1] [--steps 30] [--output <folder>]

For each inner width two lines: the adapter, beside which the base weights stay in memory, frozen, and the plain
network of two thinner layers that `compress` makes of it, without them. With one thread, of a batch of 128:

- the numbers trained, and the FLOPs of a step, forward and backward, as torch counts them (matrix products; a
  multiply-add is two);
- what is held between steps: weights and Adam's two moments;
- the peak of a step: that, and what torch's allocations of a step reach besides: activations, gradients, temporaries;
- the time of a step, by the wall and by the processor: beside other work the second tells more.
"""

import argparse
import itertools
import os
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

from recipes.lab import environment
from recipes.reports.dimension import markdown
from recipes.tasks.models import CLASSES, SHAPES, build
from recipes.training.settings import Settings
from recipes.training.train import wrap
from subspace_peft import compress


BATCH = 128
EPOCH = 60_000  # images of MNIST
MIB = 2**20


def network(model: str, dataset: str, rank: int, plain: bool) -> nn.Module:
    """Normal without a rank; else with the hidden layers as products, in one of the two ways."""
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
    """The most bytes that a step holds at once of those it allocates itself."""
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

    step()  # Adam makes its moments, and torch loads what it needs
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
    rows = []
    for rank, plain in tqdm([(0, False), *itertools.product(ranks, (False, True))], unit="method"):
        result = measure(network(model, dataset, rank, plain), SHAPES[dataset], CLASSES[dataset], steps)
        rows.append({"rank": rank, "plain": plain} | result)
    return rows


def text(rows: list[dict]) -> str:
    header = ["method", "inner width", "numbers trained", "GFLOP a step", f"TFLOP for {EPOCH:,} images"]
    header += ["held, MiB", "peak, MiB", "ms a step", "CPU ms a step"]
    cells = []
    for row in rows:
        words = "normal" if not row["rank"] else "compressed" if row["plain"] else "adapter"
        step, epoch = row["flops"] / 1e9, row["flops"] / BATCH * EPOCH / 1e12
        measured = [f"{row[key]:.0f}" for key in ("held_mib", "peak_mib", "wall_ms", "cpu_ms")]
        cells.append([words, row["rank"] or "", f"{row['trained']:,}", f"{step:.3f}", f"{epoch:.3f}", *measured])
    return "\n".join(markdown(header, cells))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", nargs="+", type=int, default=[20, 2, 10, 1], help="inner widths")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--model", default="mlp")
    parser.add_argument("--dataset", choices=SHAPES, default="mnist", help="gives the shape; the pixels are random")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    rows = costs(options.model, options.dataset, options.rank, options.steps)
    own = {"model": options.model, "dataset": options.dataset, "batch": BATCH, "steps": options.steps}
    record = own | {"load": [load, os.getloadavg()[0]], "methods": rows}
    file = options.output / "results" / "cost.json"
    environment.write(file, record)
    print(text(rows))
    print(f"load before {load:.1f}, after {os.getloadavg()[0]:.1f}; {file}")


if __name__ == "__main__":
    main()
