"""What a training step of the MLP costs: normal, and with the hidden layer as B A of inner width 2r or r.

    python recipes/low_rank_training/cost.py [--rank 20 2 10 1] [--steps 30] [--output <folder>]

For each inner width two lines: the adapter, beside which the base weights stay in memory, frozen, and the plain
network of two thinner layers that `compress` makes of it, without them. Each is measured in a process of its own, one
after the other, with one thread:

- the numbers trained, and the FLOPs of a step, forward and backward, as torch counts them (matrix products; a
  multiply-add is two);
- what is held between steps: weights, gradients and Adam's two moments;
- peak: resident memory during steps above that before the network was built (Linux's VmHWM);
- the time of a step, by the wall and by the processor: beside other work the second tells more.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes import environment
from recipes.models import CLASSES, SHAPES, build
from recipes.settings import Settings
from recipes.summary import markdown
from recipes.train import wrap
from subspace_peft import compress


BATCH = 128
EPOCH = 60_000  # images of MNIST
MIB = 2**20
STATUS, REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def network(model: str, dataset: str, rank: int, plain: bool) -> nn.Module:
    """Normal without a rank; else with the hidden layers as products, in one of the two ways."""
    if not rank:
        return build(model, dataset)
    settings = Settings(dataset=dataset, model=model, projection="identity", rank=rank, start="orthogonal")
    wrapped = wrap(build(model, dataset), settings)
    return compress(wrapped).requires_grad_() if plain else wrapped


def resident(field: str) -> float:
    """MiB of this process: now (VmRSS), or at its highest since `forget_peak` (VmHWM)."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def forget_peak() -> None:
    REFERENCES.write_text("5")


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """MiB of weights, gradients and the optimiser's state."""

    def tensors() -> Iterator[Tensor]:
        yield from model.buffers()
        for parameter in model.parameters():
            yield parameter
            if parameter.grad is not None:
                yield parameter.grad
        for state in optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))

    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors()}.values()) / MIB


def measure(model: str, dataset: str, rank: int, plain: bool, steps: int) -> dict[str, float]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images, labels = torch.rand(BATCH, *SHAPES[dataset]), torch.randint(0, CLASSES[dataset], (BATCH,))
    nn.Linear(8, 8)(torch.rand(8, 8)).sum().backward()  # what torch loads at its first use is no cost of a method
    before = resident("VmRSS")
    trained = network(model, dataset, rank, plain).train()
    parameters = [p for p in trained.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)

    def backward() -> None:
        cross_entropy(trained(images), labels).backward()

    forget_peak()
    wall, cpu = [], []
    for _ in range(steps + 2):
        at = time.perf_counter(), time.process_time()
        optimizer.zero_grad()
        backward()
        optimizer.step()
        wall.append(time.perf_counter() - at[0])
        cpu.append(time.process_time() - at[1])
    peak = resident("VmHWM") - before
    with FlopCounterMode(display=False) as counter:
        backward()
    return {
        "trained": sum(p.numel() for p in parameters),
        "flops": counter.get_total_flops(),
        "held_mib": round(held(trained, optimizer), 1),
        "peak_mib": round(peak, 1),
        "wall_ms": round(1e3 * statistics.median(wall[2:]), 1),
        "cpu_ms": round(1e3 * statistics.median(cpu[2:]), 1),
    }


def costs(model: str, dataset: str, ranks: list[int], steps: int) -> list[dict]:
    """One row for each method, from a fresh process."""
    methods = [(0, False), *((rank, plain) for rank in ranks for plain in (False, True))]
    spawn, rows = multiprocessing.get_context("spawn"), []
    for rank, plain in tqdm(methods, unit="method"):
        with ProcessPoolExecutor(1, mp_context=spawn) as process:
            result = process.submit(measure, model, dataset, rank, plain, steps).result()
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
    if not REFERENCES.exists():
        sys.exit(f"Peak memory is read from {STATUS.parent}, which only Linux has.")
    load = os.getloadavg()[0]
    rows = costs(options.model, options.dataset, options.rank, options.steps)
    own = {"model": options.model, "dataset": options.dataset, "batch": BATCH, "steps": options.steps}
    record = own | {"load": [load, os.getloadavg()[0]], "methods": rows, **environment.record()}
    file = options.output / "results" / "cost.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n")
    print(text(rows))
    print(f"load before {load:.1f}, after {os.getloadavg()[0]:.1f}; {file}")


if __name__ == "__main__":
    main()
