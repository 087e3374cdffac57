"""A whole training step of a ViT: full fine-tuning, PEFT's methods and ours.

    python recipes/speed/step.py [--rounds 30] [--threads 2] [--methods full lora fastfood] [--output <folder>]
    python recipes/speed/step.py --report

ViT of hidden 384, 6 layers, 6 heads, 64x64 pixels in patches of 8, batch 32; every linear module but the head; AdamW
over what each method trains. The methods take turns, so that other work on the machine slows all of them alike; the
load is kept beside the medians. Keep the cores idle for times that you want to quote.
"""

import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import FourierFTConfig, LoraConfig, UniLoraConfig, VeraConfig, get_peft_model
from torch import nn
from tqdm import tqdm
from transformers import ViTConfig, ViTForImageClassification
from transformers.pytorch_utils import Conv1D


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.lab import command
from recipes.lab.measurement import at_least
from recipes.lab.results import read_measurement
from recipes.reports.tables import markdown
from recipes.speed.record import FOLDER, measured, parser
from recipes.training.memory import held_for_backward
from subspace_peft import SubspaceConfig


SHAPE = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1536}
IMAGES = {"image_size": 64, "patch_size": 8, "num_labels": 100}
BATCH = 32
RANK = 8
D_SMALL = 1024
HEADS = ("classifier", "lm_head")

METHODS: dict[str, Callable | None] = {
    "full": None,
    "lora": lambda targets: LoraConfig(r=RANK, target_modules=targets),
    "unilora": lambda targets: UniLoraConfig(r=RANK, theta_d_length=D_SMALL, target_modules=targets),
    "vera": lambda targets: VeraConfig(r=256, target_modules=targets),
    "fourierft": lambda targets: FourierFTConfig(n_frequency=1000, target_modules=targets),
    "fastfood": lambda targets: SubspaceConfig(d=D_SMALL, projection="fastfood", target_modules=targets),
    "fastjl": lambda targets: SubspaceConfig(d=D_SMALL, projection="fastjl", target_modules=targets),
    "kronecker": lambda targets: SubspaceConfig(d=D_SMALL, projection="kronecker", target_modules=targets),
    "norms and biases": lambda targets: SubspaceConfig(
        d=D_SMALL, target_modules="all", parameters="vectors", exclude_modules=list(HEADS)
    ),
    "sparse": lambda targets: SubspaceConfig(d=D_SMALL, projection="sparse", target_modules=targets),
    "low_rank fastjl": lambda targets: SubspaceConfig(
        d=D_SMALL, projection="fastjl", coordinates="low_rank", rank=RANK, target_modules=targets
    ),
    "low_rank identity": lambda targets: SubspaceConfig(
        projection="identity", coordinates="low_rank", rank=RANK, target_modules=targets
    ),
}


def vit() -> nn.Module:
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**SHAPE, **IMAGES))


class Contender:
    """One method that trains its own copy of a model."""

    def __init__(self, name: str, model: nn.Module, inputs: dict[str, torch.Tensor]):
        self.name = name
        targets = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and n not in HEADS]
        config = METHODS[name]
        self.model = model.train() if config is None else get_peft_model(model, config(targets)).train()
        self.inputs = inputs
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-3)
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def step(self) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        self.model(**self.inputs).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)

    def saved_bytes(self) -> int:
        """Bytes that autograd holds between forward and backward, without the parameters."""
        return held_for_backward(lambda: self.model(**self.inputs).loss, self.model)

    def result(self, full: "Contender | None") -> dict:
        quartiles = statistics.quantiles(self.wall, n=4) if len(self.wall) > 1 else [self.wall[0]] * 3
        result = {
            "trained": sum(p.numel() for p in self.trained),
            "wall_ms": round(1e3 * statistics.median(self.wall), 1),
            "wall_quartiles_ms": [round(1e3 * quartiles[0], 1), round(1e3 * quartiles[2], 1)],
            "cpu_ms": round(1e3 * statistics.median(self.cpu), 1),
            "saved_for_backward_mb": round(self.saved_bytes() / 2**20, 1),
        }
        if full is not None:
            ratios = [mine / theirs for mine, theirs in zip(self.wall, full.wall, strict=True)]
            result["ratio"] = round(result["wall_ms"] / (1e3 * statistics.median(full.wall)), 3)
            result["ratio_by_round"] = round(statistics.median(ratios), 3)
            result["cpu_ratio"] = round(statistics.median(self.cpu) / statistics.median(full.cpu), 3)
        return result


def measure(methods: list[str], rounds: int, warm_up: int) -> dict[str, dict]:
    torch.manual_seed(0)
    images = torch.randn(BATCH, 3, IMAGES["image_size"], IMAGES["image_size"])
    labels = torch.randint(0, IMAGES["num_labels"], (BATCH,))
    inputs = {"pixel_values": images, "labels": labels}
    contenders = {name: Contender(name, vit(), inputs) for name in methods}
    gc.collect()
    gc.disable()  # a collection would slow the method that steps when it comes
    for at in tqdm(range(rounds + warm_up), unit="round"):
        for contender in contenders.values():
            if at == warm_up:
                contender.wall.clear()
                contender.cpu.clear()
            contender.step()
    gc.enable()
    return {name: contender.result(contenders.get("full")) for name, contender in contenders.items()}


def text(results: dict[str, dict]) -> str:
    rows = [
        [name, f"{r['trained']:,}", f"{r['wall_ms']:.0f}"]
        + [f"{r[key]:.2f}" if key in r else "" for key in ("ratio", "cpu_ratio")]
        + [f"{r['saved_for_backward_mb']:.0f}"]
        for name, r in results.items()
    ]
    header = ["method", "parameters trained", "ms a step", "of full fine-tuning", "CPU time, of full"]
    return "\n".join(markdown([*header, "MB saved for backward"], rows))


def tables() -> dict[str, str]:
    """What the committed results say, for the README."""
    return {"": text(read_measurement(FOLDER / "step.jsonl")["methods"])}


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=at_least(1), default=30)
    options.add_argument("--warm-up", type=at_least(0), default=2)
    options.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    chosen = options.parse_args(arguments)
    settings = {"model": {**SHAPE, **IMAGES, "batch": BATCH, "d": D_SMALL, "rank": RANK}, "rounds": chosen.rounds}
    record = measured(
        "step", chosen, lambda: settings | {"methods": measure(chosen.methods, chosen.rounds, chosen.warm_up)}
    )
    print(text(record["methods"]))


if __name__ == "__main__":
    command.run(main)
