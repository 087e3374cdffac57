"""Forward and backward of one linear layer: frozen, trained whole, with LoRA, and in weight coordinates.

    python recipes/speed/layer.py [--rounds 20] [--threads 1] [--sizes 2048x2048 ...] [--output <folder>]
    python recipes/speed/layer.py --report

The layer stands between others: its input needs a gradient too. The methods take turns; times are CPU times. Memory is
what a method needs beyond the frozen layer: tensors saved for backward but not its input, and for each trained number
its value, its gradient and the two averages of Adam. The increments that ours form again in the backward pass are not
in it.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.lab import command
from recipes.lab.measurement import at_least
from recipes.lab.results import read_measurement
from recipes.reports.tables import markdown
from recipes.speed.record import FOLDER, measured, parser
from recipes.training.memory import held_for_backward
from subspace_peft import SubspaceConfig


SIZES = {  # outputs x inputs: the number of tokens
    "384x384": 1536,
    "768x3072": 256,
    "2048x2048": 256,
    "2048x8192": 256,
}
RANK = 8
D_SMALL = 1024
BYTES_A_NUMBER = 16  # float32: value, gradient, the averages of Adam

METHODS: dict[str, Callable | None] = {
    "frozen": None,
    "full": None,
    "lora": lambda: LoraConfig(r=RANK, target_modules=["0"]),
    "fastjl": lambda: SubspaceConfig(d=D_SMALL, projection="fastjl", target_modules=["0"], parameters=["weight"]),
    "kronecker": lambda: SubspaceConfig(
        d=D_SMALL, projection="kronecker", target_modules=["0"], parameters=["weight"]
    ),
}


class Contender:
    """One method on a layer of its own."""

    def __init__(self, name: str, outputs: int, x: torch.Tensor):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(x.shape[1], outputs)).requires_grad_(name == "full")
        config = METHODS[name]
        self.model = model if config is None else get_peft_model(model, config())
        self.x = x
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.cpu: list[float] = []

    def step(self, gradient: torch.Tensor) -> None:
        for tensor in (self.x, *self.trained):
            tensor.grad = None
        cpu = time.process_time()
        self.model(self.x).backward(gradient)
        self.cpu.append(time.process_time() - cpu)

    def extra_bytes(self) -> int:
        """Beyond the frozen layer and its input."""
        held = held_for_backward(lambda: self.model(self.x), self.model, self.x)
        return held + BYTES_A_NUMBER * sum(p.numel() for p in self.trained)


def measure(size: str, rounds: int) -> dict[str, Any]:
    outputs, inputs = map(int, size.split("x"))
    torch.manual_seed(0)
    x = torch.randn(SIZES[size], inputs, requires_grad=True)
    gradient = torch.randn(SIZES[size], outputs)
    contenders = {name: Contender(name, outputs, x) for name in METHODS}
    for at in tqdm(range(rounds + 2), unit="round", desc=size):
        for contender in contenders.values():
            if at == 2:
                contender.cpu.clear()
            contender.step(gradient)
    frozen = contenders["frozen"]
    methods = {}
    for name, contender in contenders.items():
        ratios = [ours / theirs for ours, theirs in zip(contender.cpu, frozen.cpu, strict=True)]
        methods[name] = {
            "cpu_ms": round(1e3 * statistics.median(contender.cpu), 2),
            "of_frozen": round(statistics.median(ratios), 3),
            "fastest_of_frozen": round(min(contender.cpu) / min(frozen.cpu), 3),
            "extra_mb": round(contender.extra_bytes() / 2**20, 2),
        }
    return {"tokens": SIZES[size], "methods": methods}


def text(sizes: dict[str, dict]) -> str:
    rows = [
        [size, f"{measured['tokens']:,}", name]
        + [f"{r['cpu_ms']:.1f}", f"{r['of_frozen']:.2f}", f"{r['fastest_of_frozen']:.2f}", f"{r['extra_mb']:.2f}"]
        for size, measured in sizes.items()
        for name, r in measured["methods"].items()
    ]
    header = ["layer", "tokens", "method", "CPU ms", "of frozen", "fastest, of frozen", "MB more than frozen"]
    return "\n".join(markdown(header, rows))


def tables() -> dict[str, str]:
    """What the committed results say, for the README."""
    return {"": text(read_measurement(FOLDER / "layer.jsonl")["sizes"])}


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__, threads=1)
    options.add_argument("--rounds", type=at_least(1), default=20)
    options.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    chosen = options.parse_args(arguments)
    settings = {"d": D_SMALL, "rank": RANK, "rounds": chosen.rounds, "threads": chosen.threads}
    sizes = lambda: {"sizes": {size: measure(size, chosen.rounds) for size in chosen.sizes}}  # noqa: E731
    print(text(measured("layer", chosen, lambda: settings | sizes())["sizes"]))


if __name__ == "__main__":
    command.run(main)
