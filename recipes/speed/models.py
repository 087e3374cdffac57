"""A training step of a small ViT, of two language models of Llama's kind and of one like GPT-2, and its memory.

    python recipes/speed/models.py [--rounds 8] [--threads 1] [--models "Llama 768" ...] [--output <folder>]
    python recipes/speed/models.py --rounds 0 --models "GPT-2 1024"    # its memory alone
    python recipes/speed/models.py --report

Models that are not chosen stay in the result as they are, with what they were measured with under "earlier".

Every linear module but the head, or all norms and biases, AdamW, d = 1024, random tokens or images. Each method takes
turns with LoRA, so that no more than two models are held at a time. Times are CPU time; "of full" is a quotient of two
methods' "of LoRA".
Memory is what is held for backward and 16 bytes for each trained number (value, gradient, Adam's averages), and the
most that torch allocates at once beyond the base in two steps: that, P, and what is formed on the way.
"""

import argparse
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
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM


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


def gpt2() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Of 354 M parameters."""
    tokens = torch.randint(0, 8000, (1, TOKENS))
    return GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16)), {"input_ids": tokens, "labels": tokens}


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, torch.Tensor]]]] = {
    "ViT 384": vit,
    "Llama 768": llama(768, 2048, 8),
    "Llama 2048": llama(2048, 8192, 2),
    "GPT-2 1024": gpt2,
}


def measure(name: str, rounds: int) -> dict[str, dict[str, Any]]:
    results = {}
    for method in tqdm(METHODS, unit="method", desc=name):
        most = peak(partial(_two_steps, method, *_made(name)))
        contender = step.Contender(method, *_made(name))
        numbers = sum(p.numel() for p in contender.trained)
        held = contender.saved_bytes() + BYTES_A_NUMBER * numbers
        results[method] = _beside_lora(contender, name, rounds) if rounds else {}
        results[method] |= {"held_mb": round(held / 2**20, 1), "peak_mb": round(most / 2**20, 1)}
        del contender  # before the next is made
    for result in results.values() if rounds else ():
        result["of_full"] = round(result["of_lora"] / results["full"]["of_lora"], 3)
    return results


def _beside_lora(contender: step.Contender, name: str, rounds: int) -> dict[str, Any]:
    lora = contender if contender.name == "lora" else step.Contender("lora", *_made(name))
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
    return {
        "cpu_s": round(statistics.median(contender.cpu), 3),
        "lora_cpu_s": round(statistics.median(lora.cpu), 3),
        "of_lora": round(statistics.median(ratios), 3),
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
        + [f"{r[key]:.2f}" if key in r else "" for key in ("cpu_s", "lora_cpu_s", "of_lora", "of_full")]
        + [f"{r[key]:.0f}" for key in ("held_mb", "peak_mb")]
        for name, methods in models.items()
        for method, r in methods.items()
    ]
    header = ["model", "method", "CPU s a step", "of LoRA beside it", "of LoRA", "of full"]
    return "\n".join(markdown([*header, "MB held beyond the base", "MB at most"], rows))


def beside_lora(models: dict[str, dict]) -> str:
    """CPU time of a step, memory beyond the base, and the most of it, of LoRA's; no time where none was measured."""
    others = [method for method in METHODS if method != "lora"]
    rows = []
    for name, methods in models.items():
        lora = methods["lora"]
        cells = {
            method: (f"{r['of_lora']:.2f}" if "of_lora" in r else "-")
            + "".join(f", {r[key] / lora[key]:.2f}" for key in ("held_mb", "peak_mb"))
            for method, r in methods.items()
        }
        rows.append([name, *(cells.get(method, "") for method in others)])
    return "\n".join(markdown(["model", *others], rows))


def tables() -> dict[str, str]:
    """What the committed results say, for pages."""
    models = read_measurement(FOLDER / "models.jsonl")["models"]
    return {"methods": text(models), "beside LoRA": beside_lora(models)}


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__, threads=1)
    options.add_argument("--rounds", type=at_least(0), default=8, help="of steps that are timed; 0: none")
    options.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    chosen = options.parse_args(arguments)
    print(text(measured("models", chosen, partial(record, chosen))["models"]))


def record(chosen: argparse.Namespace) -> dict[str, Any]:
    """The settings, the models that are measured now, and the others that the file has, with what they came from."""
    settings = {"d": step.D_SMALL, "rank": step.RANK, "rounds": chosen.rounds, "threads": chosen.threads}
    file = chosen.output / "models.jsonl"
    before = read_measurement(file) if file.exists() else {"models": {}}
    origin = {key: value for key, value in before.items() if key not in ("models", "earlier")}
    earlier = {name: origin for name in before["models"] if name not in chosen.models} | before.get("earlier", {})
    earlier = {name: made for name, made in earlier.items() if name not in chosen.models}
    others = {name: before["models"][name] for name in earlier}
    found = others | {name: measure(name, chosen.rounds) for name in chosen.models}
    return settings | {"models": {name: found[name] for name in MODELS if name in found}, "earlier": earlier}


if __name__ == "__main__":
    command.run(main)
