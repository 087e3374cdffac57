"""Times to wrap an 86 M-parameter ViT and to load its adapter, the state that P keeps, and the size of the file.

    python recipes/speed/setup.py [--threads 2] [--output <folder>]
    python recipes/speed/setup.py --report

The linear layers are adapted (`target_modules="all-linear"`). The first use draws what the cache keeps of P. The size
of the file is that of a small network's adapter. "Large" wraps a language model of 8 B parameters that are not there
(on the device "meta") and draws the state that the cache keeps, without P theta_d.
"""

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.lab import command
from recipes.lab.results import read_measurement
from recipes.reports.tables import joined, markdown
from recipes.speed.record import FOLDER, measured, parser
from subspace_peft import SubspaceConfig
from subspace_peft.adapter.config import NORMALIZATIONS
from subspace_peft.adapter.layer import SubspaceLayer
from subspace_peft.projections.base import Projection
from subspace_peft.projections.kronecker import Kronecker


D_SMALL = 1000
FILE_SIZES = (64, 100, 1000, 4000, 10000)
PROJECTIONS = ("fastfood", "fastjl", "kronecker", "sparse")
OF_BITS = ("kronecker", "fastjl")  # whose state is a small part of a byte for each entry
FILE_COLUMNS = ("projection", "d", "weights_bytes", "beyond_4d", "config_bytes")


def vit() -> nn.Module:
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig())


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 10))


def llama() -> nn.Module:
    """The shapes of Llama 3 8B."""
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=32, num_key_value_heads=8))


def storages(model: nn.Module) -> int:
    """Bytes of the tensors that the projections of a model have drawn and keep."""
    seen = {}

    def visit(held) -> None:
        if isinstance(held, torch.Tensor):
            seen[held.untyped_storage().data_ptr()] = held.untyped_storage().nbytes()
        elif isinstance(held, (tuple, list)):
            for each in held:
                visit(each)

    for projection in projections(model):
        parts = (projection.mixing, projection.blocks) if isinstance(projection, Kronecker) else (projection,)
        for part in parts:
            visit(list(part._drawn.values()))
        for joint in getattr(parts[-1].joint_cache, "joints", ()):
            visit(joint._drawn)
    return sum(seen.values())


def projections(model: nn.Module) -> Iterator[Projection]:
    for layer in (module for module in model.modules() if isinstance(module, SubspaceLayer)):
        for coordinates in layer.coordinates["default"].values():
            yield from coordinates.projections.values()


def draw(model: nn.Module) -> None:
    """Let every layer use its P once, as the first training step does."""
    with torch.no_grad():
        for layer in (module for module in model.modules() if isinstance(module, SubspaceLayer)):
            layer.increments(["default"])


def timed(function):
    start = time.perf_counter()
    value = function()
    return value, round(time.perf_counter() - start, 2)


def wrap(projection: str, normalization: str, cache: bool) -> dict:
    config = SubspaceConfig(
        d=D_SMALL,
        projection=projection,
        normalization=normalization,
        cache_projection=cache,
        target_modules="all-linear",
    )
    base = vit()
    model, seconds = timed(lambda: get_peft_model(base, config))
    result = {"projection": projection, "normalization": normalization, "cache": cache, "wrap_s": seconds}
    result["first_use_s"] = timed(lambda: draw(model))[1]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        fresh = vit()
        loaded, result["load_s"] = timed(lambda: PeftModel.from_pretrained(fresh, folder))
        del loaded
    result["D"] = model.peft_config["default"].D
    result["state_bytes_an_entry"] = round(storages(model) / result["D"], 4)
    return result


def wrap_large(projection: str) -> dict:
    base, process = llama(), psutil.Process()
    config = SubspaceConfig(d=D_SMALL, projection=projection, target_modules="all-linear")
    before = process.memory_info().rss
    model, seconds = timed(lambda: get_peft_model(base, config))
    _, draw_seconds = timed(lambda: [each.state(torch.device("cpu")) for each in projections(model)])
    after, D = process.memory_info().rss, model.peft_config["default"].D
    return {
        "projection": projection,
        "D": D,
        "wrap_s": seconds,
        "draw_s": draw_seconds,
        "mb": round((after - before) / 2**20),
        "state_bytes_an_entry": round(storages(model) / D, 4),
    }


def file_size(projection: str, d: int) -> dict:
    model = get_peft_model(small(), SubspaceConfig(d=d, projection=projection, target_modules="all-linear"))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        weights = os.path.getsize(Path(folder) / "adapter_model.safetensors")
        config = os.path.getsize(Path(folder) / "adapter_config.json")
    return {
        "projection": projection,
        "d": d,
        "weights_bytes": weights,
        "beyond_4d": weights - 4 * d,
        "config_bytes": config,
    }


def measure() -> dict[str, Any]:
    cases = [
        (projection, normalization, cache)
        for projection in PROJECTIONS
        for normalization, cache in (*((each, True) for each in NORMALIZATIONS), ("rows", False))
    ]
    large = [wrap_large(projection) for projection in OF_BITS]  # first: freed memory of others would hide theirs
    return {
        "model": "ViT-B/16 (transformers' ViTConfig()), all-linear",
        "d": D_SMALL,
        "wrapping": [wrap(*case) for case in tqdm(cases, unit="case")],
        "large": large,
        "files": [file_size(projection, d) for projection in PROJECTIONS for d in FILE_SIZES],
    }


def parts(record: dict[str, Any]) -> dict[str, str]:
    """The tables "wrapping", "large" and "files"."""
    rows = [
        [row["projection"], row["normalization"], "on" if row["cache"] else "off"]
        + [f"{row[key]:.1f}" for key in ("wrap_s", "first_use_s", "load_s")]
        + [f"{row['state_bytes_an_entry']:.3f}"]
        for row in record["wrapping"]
    ]
    header = ["projection", "normalisation", "cache", "wrap, s", "first use, s", "load, s"]
    wrapping = markdown([*header, "bytes of state an entry"], rows)
    rows = [
        [row["projection"], f"{row['D']:,}", f"{row['wrap_s']:.1f}", f"{row['draw_s']:.1f}", row["mb"]]
        + [f"{row['state_bytes_an_entry']:.4f}"]
        for row in record["large"]
    ]
    header = ["projection", "D", "wrap, s", "draw the state, s", "MB of both", "bytes of state an entry"]
    large = markdown(header, rows)
    files = [[row[key] for key in FILE_COLUMNS] for row in record["files"]]
    header = ["projection", "d", "file of the adapter, bytes", "beyond 4 d", "adapter_config.json, bytes"]
    return {"wrapping": "\n".join(wrapping), "large": "\n".join(large), "files": "\n".join(markdown(header, files))}


def text(record: dict[str, Any]) -> str:
    return joined(parts(record))


def tables() -> dict[str, str]:
    """What the committed results say, for the README."""
    return parts(read_measurement(FOLDER / "setup.jsonl"))


def main(arguments: list[str] | None = None) -> None:
    print(text(measured("setup", parser(__doc__).parse_args(arguments), measure)))


if __name__ == "__main__":
    command.run(main)
