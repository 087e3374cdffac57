"""A training step of a small ViT and of two language models of Llama's kind, and its memory.

    python recipes/speed/models.py [--rounds 8] [--threads 1] [--models "Llama 768" ...] [--output <folder>]
    python recipes/speed/models.py --report

Every linear module but the head, or all norms and biases, AdamW, d = 1024, random tokens or images. Each method takes
turns with LoRA, so that no more than two models are held at a time. Times are CPU time; "of full" is a quotient of two
methods' "of LoRA".
Memory is what is held for backward and 16 bytes for each trained number (value, gradient, Adam's averages), and the
most that torch allocates at once beyond the base in two steps: that, P, and what is formed on the way.
"""

import gc
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.lab import command
from recipes.lab.measurement import at_least
from recipes.lab.results import read_measurement
from recipes.reports.tables import markdown
from recipes.speed import step
from recipes.speed.layer import BYTES_A_NUMBER
from recipes.speed.record import FOLDER, measured, parser
from recipes.training.memory import peak


METHODS = ("full", "lora", "unilora", "fastjl", "kronecker", "norms and biases", "sparse", "fastfood")
TOKENS = 256


def vit() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    pixels = torch.randn(step.BATCH, 3, step.IMAGES["image_size"], step.IMAGES["image_size"])
    labels = torch.randint(0, step.IMAGES["num_labels"], (step.BATCH,))
    return step.vit(), {"pixel_values": pixels, "labels": labels}


def llama(hidden: int, intermediate: int, layers: int) -> Callable[[], tuple[nn.Module, dict[str, torch.Tensor]]]:
    def make() -> tuple[nn.Module, dict[str, torch.Tensor]]:
        heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64}
        sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
        model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, vocab_size=8000))
        tokens = torch.randint(0, 8000, (1, TOKENS))
        return model, {"input_ids": tokens, "labels": tokens}

    return make


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, torch.Tensor]]]] = {
    "ViT 384": vit,
    "Llama 768": llama(768, 2048, 8),
    "Llama 2048": llama(2048, 8192, 2),
}


def measure(name: str, rounds: int) -> dict[str, dict[str, Any]]:
    results = {}
    for method in tqdm(METHODS, unit="method", desc=name):
        most = peak(partial(_two_steps, method, *_made(name)))
        results[method] = _beside_lora(method, name, rounds) | {"peak_mb": round(most / 2**20, 1)}
    for result in results.values():
        result["of_full"] = round(result["of_lora"] / results["full"]["of_lora"], 3)
    return results


def _beside_lora(method: str, name: str, rounds: int) -> dict[str, Any]:
    lora = step.Contender("lora", *_made(name))
    contender = lora if method == "lora" else step.Contender(method, *_made(name))
    turns = list(dict.fromkeys((lora, contender)))
    gc.collect()
    gc.disable()  # a collection would slow the method that steps when it comes
    try:
        for at in range(rounds + 1):
            for each in turns[:: 1 if at % 2 else -1]:
                each.step()
                if at == 0:
                    each.cpu.clear()
    finally:
        gc.enable()
    ratios = [ours / theirs for ours, theirs in zip(contender.cpu, lora.cpu, strict=True)]
    numbers = sum(p.numel() for p in contender.trained)
    return {
        "cpu_s": round(statistics.median(contender.cpu), 3),
        "lora_cpu_s": round(statistics.median(lora.cpu), 3),
        "of_lora": round(statistics.median(ratios), 3),
        "held_mb": round((contender.saved_bytes() + BYTES_A_NUMBER * numbers) / 2**20, 1),
    }


def _made(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return MODELS[name]()


def _two_steps(method: str, model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    contender = step.Contender(method, model, inputs)
    contender.step()
    contender.step()


def text(models: dict[str, dict]) -> str:
    rows = [
        [name, method]
        + [f"{r[key]:.2f}" for key in ("cpu_s", "lora_cpu_s", "of_lora", "of_full")]
        + [f"{r[key]:.0f}" for key in ("held_mb", "peak_mb")]
        for name, methods in models.items()
        for method, r in methods.items()
    ]
    header = ["model", "method", "CPU s a step", "of LoRA beside it", "of LoRA", "of full"]
    return "\n".join(markdown([*header, "MB held beyond the base", "MB at most"], rows))


def beside_lora(models: dict[str, dict]) -> str:
    """CPU time of a step and memory beyond the base, of LoRA's."""
    rows = []
    for name, methods in models.items():
        memory = methods["lora"]["held_mb"]
        cells = [f"{r['of_lora']:.2f}, {r['held_mb'] / memory:.2f}" for m, r in methods.items() if m != "lora"]
        rows.append([name, *cells])
    return "\n".join(markdown(["model", *(m for m in next(iter(models.values())) if m != "lora")], rows))


def tables() -> dict[str, str]:
    """What the committed results say, for pages."""
    models = read_measurement(FOLDER / "models.jsonl")["models"]
    return {"methods": text(models), "beside LoRA": beside_lora(models)}


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__, threads=1)
    options.add_argument("--rounds", type=at_least(1), default=8)
    options.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    chosen = options.parse_args(arguments)
    settings = {"d": step.D_SMALL, "rank": step.RANK, "rounds": chosen.rounds, "threads": chosen.threads}
    models = lambda: {"models": {name: measure(name, chosen.rounds) for name in chosen.models}}  # noqa: E731
    print(text(measured("models", chosen, lambda: settings | models())["models"]))


if __name__ == "__main__":
    command.run(main)
