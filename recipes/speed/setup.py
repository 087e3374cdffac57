"""Wrapping an 86 M-parameter ViT, loading its adapter, the state that P keeps, and the size of the file.

python recipes/speed/setup.py [--threads 2] [--output <file>]
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import ViTConfig, ViTForImageClassification


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.speed.record import keep
from subspace_peft import SubspaceConfig
from subspace_peft.adapter.config import NORMALIZATIONS
from subspace_peft.adapter.layer import SubspaceLayer


D_SMALL = 1000
FILE_SIZES = (64, 100, 1000, 4000, 10000)
PROJECTIONS = ("fastfood", "fastjl", "sparse")
RESULTS = Path(__file__).parent / "results"


def vit() -> nn.Module:
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig())


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 10))


def storages(model: nn.Module) -> int:
    """Bytes of every tensor that the drawn P of a model hold."""
    seen = {}

    def visit(tensors) -> None:
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            elif isinstance(tensor, (tuple, list)):
                visit(tensor)

    for layer in (module for module in model.modules() if isinstance(module, SubspaceLayer)):
        for coordinates in layer.coordinates["default"].values():
            for projection in coordinates.projections.values():
                visit(projection._drawn.values())
                for joint in getattr(projection.joint_cache, "joints", ()):
                    visit(joint._drawn)
    return sum(seen.values())


def draw(model: nn.Module) -> None:
    """Makes every layer use its P once, as a first step does."""
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
    result["state_bytes_an_entry"] = round(storages(model) / result["D"], 2)
    return result


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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    parser.add_argument("--output", type=Path, default=RESULTS / "setup.json")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    before = os.getloadavg()
    rows = []
    for projection in PROJECTIONS:
        for normalization in NORMALIZATIONS:
            rows.append(wrap(projection, normalization, cache=True))
            print(rows[-1], flush=True)
        rows.append(wrap(projection, "rows", cache=False))
        print(rows[-1], flush=True)
    files = [file_size(projection, d) for projection in PROJECTIONS for d in FILE_SIZES]
    record = {
        "model": "ViT-B/16 (transformers' ViTConfig()), all-linear",
        "d": D_SMALL,
        "wrapping": rows,
        "files": files,
    }
    keep(options.output, record, before, "\n".join(map(str, files)))


if __name__ == "__main__":
    main()
