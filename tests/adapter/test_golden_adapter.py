"""Golden adapters: files written once, which must load and give the same outputs for good.

`python -m tests.adapter.test_golden_adapter` writes the missing ones and never writes over one.
"""

import os
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from subspace_peft import SubspaceConfig
from tests.cases import theta_d
from tests.models import Attention, ConvNet, Padded


FOLDER = Path(__file__).parents[1] / "golden" / "adapter"
OUTPUTS = FOLDER.parent / "outputs.safetensors"
"""Those of each adapter and of its base."""
LOW_RANK = {"coordinates": "low_rank", "rank": 2, "alpha": 4.0}
REPLACED = {**LOW_RANK, "replace_weight": True, "target_modules": ["conv1", "head"]}
ADAPTERS = {
    "dense": {"projection": "dense", "d": 11, "seed": 1},
    "sparse": {"projection": "sparse", "d": 11, "seed": 2**62, "nnz_per_row": 2},
    "fastfood": {"projection": "fastfood", "d": 70, "seed": 3, "normalization": "columns"},
    "fastjl": {"projection": "fastjl", "d": 70, "seed": 4},
    "low_rank": {"projection": "fastfood", "d": 11, "seed": 5, **LOW_RANK},
    "three_factors": {"projection": "fastjl", "d": 11, "seed": 6, **LOW_RANK, "factors": 3, "gamma": 0.5},
    "svd": {"projection": "sparse", "d": 11, "seed": 7, **REPLACED},
    "orthogonal": {"projection": "fastfood", "d": 11, "seed": 8, "start": "orthogonal", **REPLACED},
    "random": {"projection": "fastjl", "d": 11, "seed": 9, "start": "random", "factors": 3, **REPLACED},
    "saved_fastjl": {"projection": "fastjl", "d": 70, "seed": 12, "save_projection": True},
    "attention": {"projection": "fastfood", "d": 11, "seed": 13},
    "attention_by_name": {"projection": "sparse", "d": 11, "seed": 14, "target_modules": ["packed", "split"]},
    "attention_parameters": {
        "projection": "dense",
        "d": 11,
        "seed": 15,
        "target_modules": ["packed"],
        "parameters": ["out_proj.weight"],
    },
    "kronecker": {"projection": "kronecker", "d": 70, "seed": 16},
    # Written when the rows of padding still moved; see docs/adapter_file.md.
    "moved_padding": {"projection": "fastfood", "d": 11, "seed": 10},
    "moved_padding_low_rank": {"projection": "fastjl", "d": 11, "seed": 11, **LOW_RANK, "factors": 3},
}


LARGE = ("fastfood", "low_rank", "three_factors", "attention_parameters")
"""Those whose theta_d must be larger to move the outputs."""
BASES = {
    "padding": Padded,
    "attention": Attention,
    "saved": lambda: nn.Sequential(nn.Linear(40, 40), nn.Tanh()),
    "kronecker": lambda: nn.Sequential(nn.Embedding(261, 256), nn.Tanh(), nn.Linear(256, 307), nn.Tanh()),
}
"""A word in the name of an adapter -> its base, where that is not the ConvNet."""


def exact(shape, step: int) -> torch.Tensor:
    """Eighths from -1 to 1 in an order of period 17: the same numbers on every machine."""
    n = torch.Size(shape).numel()
    return ((torch.arange(n) * step) % 17 - 8).float().view(shape) / 8


@torch.no_grad()
def base(name: str) -> nn.Module:
    model = next((build for word, build in BASES.items() if word in name), ConvNet)().eval()
    for step, parameter in enumerate(model.parameters(), 3):
        parameter.copy_(exact(parameter.shape, step) / 2)
    return model


def inputs(name: str) -> torch.Tensor:
    if "kronecker" in name:
        return torch.tensor([[3, 7, 0, 260], [1, 10, 2, 0]])
    if "padding" in name:
        return torch.tensor([[3, 7, 0, 0], [1, 10, 2, 0]])
    return exact((2, 5, 8) if "attention" in name else (2, 4, 40) if "saved" in name else (2, 3, 8, 8), 5)


@torch.no_grad()
def write(name: str) -> None:
    model = get_peft_model(base(name), SubspaceConfig(**{"target_modules": "all", **ADAPTERS[name]})).eval()
    theta_d(model).copy_(exact(theta_d(model).shape, 7) / (2 if name in LARGE else 16))
    model.save_pretrained(FOLDER / name)
    os.remove(FOLDER / name / "README.md")
    both = {"outputs": model, "base": base(name)}
    kept = load_file(OUTPUTS) if OUTPUTS.exists() else {}
    save_file(kept | {f"{name}/{kind}": module(inputs(name)).contiguous() for kind, module in both.items()}, OUTPUTS)


def golden(name: str) -> dict[str, torch.Tensor]:
    return {kind: load_file(OUTPUTS)[f"{name}/{kind}"] for kind in ("outputs", "base")}


@pytest.mark.parametrize("name", ADAPTERS)
@torch.no_grad()
def test_outputs_are_those_of_the_day_it_was_written(name):
    expected = golden(name)
    torch.testing.assert_close(base(name)(inputs(name)), expected["base"], rtol=0, atol=1e-6)
    model = PeftModel.from_pretrained(base(name), FOLDER / name).eval()
    torch.testing.assert_close(model(inputs(name)), expected["outputs"], rtol=0, atol=1e-6)
    assert (expected["outputs"] - expected["base"]).abs().max() > 1e-2


if __name__ == "__main__":
    for name in ADAPTERS:
        if not (FOLDER / name).exists():
            write(name)
