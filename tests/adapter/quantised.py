"""A small model quantised by every library, and the same model dequantised."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn


bnb = pytest.importorskip("bitsandbytes")
torchao = pytest.importorskip("torchao.quantization")


class MODEL(nn.Module):
    """Three Linears, one without a bias, and two larger than what is held for the backward pass."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.norm, self.fc2 = nn.Linear(64, 192), nn.LayerNorm(192), nn.Linear(192, 64)
        self.out = nn.Linear(64, 32, bias=False)

    def forward(self, x):
        return self.out(torch.tanh(self.fc2(self.norm(torch.tanh(self.fc1(x))))))


def x(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).to(dtype)


def by_module(make: Callable[[nn.Linear], nn.Module]) -> Callable[[nn.Module], None]:
    """Replace each Linear by the module that this makes for it, with its weight and bias."""

    def quantise(model: nn.Module) -> None:
        for name, linear in list(model.named_modules()):
            if isinstance(linear, nn.Linear):
                module = make(linear)
                module.load_state_dict(linear.state_dict())
                model.set_submodule(name, module.to("cpu"))

    return quantise


def four_bits(**options) -> Callable[[nn.Module], None]:
    return by_module(
        lambda linear: bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None, quant_type="nf4", **options
        )
    )


def torchao_by(config) -> Callable[[nn.Module], None]:
    return lambda model: torchao.quantize_(model, config)


KINDS = {
    "4-bit": four_bits(),
    "4-bit, nested scales": four_bits(compress_statistics=True),
    "4-bit, stored as bfloat16": four_bits(quant_storage=torch.bfloat16),
    "8-bit": by_module(
        lambda linear: bnb.nn.Linear8bitLt(
            linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False, threshold=6.0
        )
    ),
    "int8": torchao_by(torchao.Int8WeightOnlyConfig()),
    "int4": torchao_by(
        torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=torchao.granularity.PerGroup(32))
    ),
    "int8, activations too": torchao_by(torchao.Int8DynamicActivationInt8WeightConfig()),
}
WEIGHT_ONLY = [kind for kind in KINDS if "activations" not in kind]


def quantised(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model with all Linears quantised, the same at each call, in training mode."""
    model = MODEL().to(dtype)
    KINDS[kind](model)
    return model


@torch.no_grad()
def dequantised(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The oracle: the plain model with the weights that the library reads from its own, before anything has run."""
    model, plain = quantised(kind, dtype), MODEL().to(dtype)
    for name in ("fc1", "fc2", "out"):
        plain.get_submodule(name).weight.copy_(weight_of(model.get_submodule(name)))
    return plain


def weight_of(module: nn.Module) -> Tensor:
    if isinstance(module, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    if isinstance(module, bnb.nn.Linear8bitLt):
        return bnb.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
    return module.weight.dequantize()
