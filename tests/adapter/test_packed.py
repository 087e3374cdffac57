"""Linears whose weight GPTQ, AWQ, HQQ, EETQ or AQLM packs into integers are refused by name, never passed over."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from tests.cases import refused, settings


def integers(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


PACKED = {  # class -> its tensors, and which of them are parameters
    "GPTQ": ({"qweight": integers(1, 8, dtype=torch.int32), "scales": torch.ones(1, 8).half()}, ()),
    "AWQ": ({"qweight": integers(8, 1, dtype=torch.int32), "bias": torch.ones(8).half()}, ()),
    "HQQ": ({"W_q": integers(4, 8, dtype=torch.uint8), "bias": torch.ones(8)}, ("W_q", "bias")),
    "EETQ": ({"weight": integers(8, 8, dtype=torch.int8), "bias": torch.ones(8)}, ("bias",)),
    "AQLM": ({"codes": integers(8, 1, 1, dtype=torch.int8), "scales": torch.ones(8, 1)}, ("codes", "scales")),
}


def model(kind: str) -> nn.Sequential:
    """Stands for a model of that library, which is not needed: the layout of its Linear is."""
    tensors, parameters = PACKED[kind]
    packed = type(f"{kind}Linear", (nn.Module,), {})()
    packed.in_features = packed.out_features = 8
    for name, tensor in tensors.items():
        if name in parameters:
            packed.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        else:
            packed.register_buffer(name, tensor)
    return nn.Sequential(packed, nn.Linear(8, 8))


@pytest.mark.parametrize("targets", ["all", "all-linear", ["0"]], ids=str)
@pytest.mark.parametrize("kind", PACKED)
def test_a_packed_linear_is_refused_by_name(kind, targets):
    base = model(kind)
    with refused(base, f"must be a Linear of bitsandbytes or torchao: `0` is a {kind}Linear, which packs its weight"):
        get_peft_model(base, settings(target_modules=targets))


@pytest.mark.parametrize("kind", PACKED)
def test_what_is_beside_it_is_a_target(kind):
    adapted = get_peft_model(model(kind), settings(target_modules="all", exclude_modules=["0"]))
    assert adapted.base_model.D == 72


@pytest.mark.parametrize("kind", PACKED)
def test_vectors_of_all_modules_are_those_of_the_others(kind):
    adapted = get_peft_model(model(kind), settings(target_modules="all", parameters="vectors"))
    assert adapted.base_model.D == 8


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_scales_of_a_quantised_weight_are_no_vectors(dtype):
    base = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    base[0].weight = nn.Parameter(torch.ones(8, 8).to(dtype), requires_grad=False)
    base[0].weight_scale = nn.Parameter(torch.ones(1))
    adapted = get_peft_model(base, settings(target_modules="all", parameters="vectors"))
    assert adapted.targeted_module_names == ["1"]


def test_integers_in_other_modules_are_no_weights():
    base = nn.Sequential(nn.Linear(8, 8))
    base[0].register_buffer("positions", torch.arange(8)[None])
    assert get_peft_model(base, settings(target_modules="all-linear")).base_model.D == 72
