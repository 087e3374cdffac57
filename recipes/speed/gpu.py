"""On a GPU: what must hold there, and a training step of a 1 B Llama and of ViT-B/16 beside PEFT's methods.

    python -m recipes.speed.gpu [--device cuda] [--rounds 20] [--models "Llama 1B" ViT-B/16] [--methods full lora ...]
    python -m recipes.speed.gpu --report

It runs tests/test_gpu.py, then the steps: bfloat16, every linear module but the head, AdamW, d = 1024, random tokens
or images. Each method has the GPU to itself. Memory is the most that was held during steps, beyond the base. With
`--device cpu` the same code runs without a GPU, and memory is that of models.py.
"""

import gc
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from recipes.lab import command
from recipes.lab.measurement import at_least
from recipes.reports.tables import markdown
from recipes.speed import step
from recipes.speed.layer import BYTES_A_NUMBER
from recipes.speed.record import measured, parser


METHODS = ("full", "lora", "unilora", "vera", "fastjl", "kronecker", "norms and biases", "sparse", "fastfood")
METHODS += ("low_rank fastjl",)
WARM_UP = 3
Inputs = dict[str, torch.Tensor]


def llama(batch: int = 2, tokens: int = 512, **sizes: int) -> tuple[nn.Module, Inputs]:
    """The shapes of Llama 3.2 1B."""
    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128_256}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    config = LlamaConfig(**{**shape, **heads, "tie_word_embeddings": True, **sizes})
    ids = torch.randint(0, config.vocab_size, (batch, tokens))
    return LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}


def vit(batch: int = 32, **sizes: int) -> tuple[nn.Module, Inputs]:
    """ViT-B/16, the default of transformers."""
    config = ViTConfig(num_labels=100, **sizes)
    pixels = torch.randn(batch, 3, config.image_size, config.image_size)
    return ViTForImageClassification(config), {"pixel_values": pixels, "labels": torch.randint(0, 100, (batch,))}


MODELS: dict[str, Callable[[], tuple[nn.Module, Inputs]]] = {"Llama 1B": llama, "ViT-B/16": vit}


def tests(device: str) -> dict[str, Any]:
    """How the tests of this device ended."""
    words = [sys.executable, "-m", "pytest", "-q", "-n", "0", "--device", device, str(ROOT / "tests" / "test_gpu.py")]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = ended.stdout.splitlines()
    return {
        "exit_status": ended.returncode,
        "summary": re.sub(r" in [\d.]+s.*", "", lines[-1]) if lines else ended.stderr[-500:],
        "failed": [line.split(" - ")[0] for line in lines if line.startswith(("FAILED", "ERROR"))],
    }


def measure(name: str, method: str, device: torch.device, rounds: int) -> dict[str, Any]:
    """A step's milliseconds, and what it holds beyond the base."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    model = model.to(device, torch.bfloat16)
    inputs = {key: x.to(device, torch.bfloat16 if x.is_floating_point() else x.dtype) for key, x in inputs.items()}
    base = _held(device)
    contender = step.Contender(method, model, inputs)
    times = []
    for at in tqdm(range(WARM_UP + rounds), unit="step", desc=f"{name}, {method}"):
        if at == WARM_UP and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        start = _now(device)
        contender.step()
        times.append(_now(device) - start)
    numbers = sum(p.numel() for p in contender.trained)
    if device.type == "cuda":
        beyond = torch.cuda.max_memory_allocated(device) - base
    else:
        beyond = contender.saved_bytes() + BYTES_A_NUMBER * numbers
    return {
        "trained": numbers,
        "ms": round(1e3 * statistics.median(times[WARM_UP:]), 2),
        "beyond_base_mb": round(beyond / 2**20, 1),
    }


def _held(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _now(device: torch.device) -> float:
    """Seconds, when the device has done all that it was given; those of this process where it is the CPU."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def steps(name: str, methods: list[str], device: torch.device, rounds: int) -> dict[str, dict[str, Any]]:
    results = {}
    for method in methods:
        results[method] = measure(name, method, device, rounds)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    for result in results.values():
        for other in ("full", "lora"):
            if other in results:
                result[f"of_{other}"] = round(result["ms"] / results[other]["ms"], 3)
    return results


def text(record: dict[str, Any]) -> str:
    rows = [
        [name, method, f"{r['trained']:,}", f"{r['ms']:.1f}", r.get("of_full", ""), r.get("of_lora", "")]
        + [f"{r['beyond_base_mb']:.0f}"]
        for name, methods in record["models"].items()
        for method, r in methods.items()
    ]
    header = ["model", "method", "trained", "ms a step", "of full", "of LoRA", "MB beyond the base"]
    where = f"{record['hardware']['gpu'] or record['hardware']['cpu']}; tests: {record['tests']['summary']}"
    return "\n".join([where, *record["tests"]["failed"], "", *markdown(header, rows)])


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    options.add_argument("--rounds", type=at_least(1), default=20)
    options.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    options.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    chosen = options.parse_args(arguments)
    if not chosen.report and chosen.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("`--device cuda` needs a GPU, torch sees none; use --device cpu to run the same code.")

    def found() -> dict[str, Any]:
        device = torch.device(chosen.device)
        models = {name: steps(name, chosen.methods, device, chosen.rounds) for name in chosen.models}
        settings = {"device": chosen.device, "rounds": chosen.rounds, "d": step.D_SMALL, "rank": step.RANK}
        return {**settings, "tests": tests(chosen.device), "models": models}

    print(text(measured("gpu", chosen, found)))


if __name__ == "__main__":
    command.run(main)
