"""Merging adapters into a quantised base: nothing is quantised again, and unmerging gives back what was there."""

import pytest
import torch
from torch import nn

from subspace_peft import SubspaceConfig
from subspace_peft.adapter.walk import named_layers
from tests.adapter.quantised import KINDS, WEIGHT_ONLY, dequantised, quantised, x
from tests.adapter.test_quantised import CLOSE, VECTORS, moved
from tests.cases import move, theta_d


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_merging_dequantises_and_unmerging_gives_the_quantised_modules_back(kind):
    model = moved(quantised(kind)).eval()
    bases = {name: layer.base_layer for name, layer in named_layers(model)}
    expected, before = moved(dequantised(kind)).eval()(x()), model(x())
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(x()), expected, **CLOSE)
    assert {type(layer.base_layer) for _, layer in named_layers(model)} == {nn.Linear}
    model.unmerge_adapter()
    assert {name: layer.base_layer for name, layer in named_layers(model)} == bases
    assert torch.equal(model(x()), before)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x()), expected, **CLOSE)
    assert {type(module) for module in merged.children()} == {nn.Linear, nn.LayerNorm}


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_norms_and_biases_merge_into_the_quantised_modules(kind):
    model = moved(quantised(kind), **VECTORS).eval()
    bases = {name: layer.base_layer for name, layer in named_layers(model)}
    before = {
        name: p.clone()
        for name, p in model.named_parameters()
        if name.endswith(("fc1.base_layer.bias", "fc2.base_layer.bias"))
    }
    model.add_adapter("of weights", SubspaceConfig(d=5, target_modules=["fc1", "fc2"]))
    move(model, "of weights")
    close = CLOSE if kind in WEIGHT_ONLY else {"rtol": 0.02, "atol": 0.02}
    expected = model(x())
    model.merge_adapter(safe_merge=True)
    assert {name: layer.base_layer for name, layer in named_layers(model)} == bases
    torch.testing.assert_close(model(x()), expected, **close)
    model.merge_adapter(adapter_names=["of weights"])
    assert {type(model.fc1.base_layer), type(model.norm.base_layer)} == {nn.Linear, nn.LayerNorm}
    model.unmerge_adapter()
    assert {name: layer.base_layer for name, layer in named_layers(model)} == bases
    assert all(torch.equal(model.get_parameter(name), bias) for name, bias in before.items())
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x()), expected, **close)
    assert merged.fc1 is bases[next(name for name in bases if name.endswith("fc1"))]


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
@torch.no_grad()
def test_a_merge_that_is_refused_leaves_the_quantised_modules_with_what_they_had_merged():
    model = moved(quantised("4-bit"), **VECTORS).eval()
    bases = [layer.base_layer for _, layer in named_layers(model)]
    model.add_adapter("of weights", SubspaceConfig(d=5, target_modules=["fc1"]))
    before, expected = model.fc1.base_layer.bias.clone(), model(x())
    model.merge_adapter()
    theta_d(model, "of weights").fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True, adapter_names=["of weights"])
    assert [layer.base_layer for _, layer in named_layers(model)] == bases
    torch.testing.assert_close(model(x()), expected, **CLOSE)
    model.unmerge_adapter()
    assert torch.equal(model.fc1.base_layer.bias, before)


def test_a_merge_that_is_refused_leaves_the_quantised_modules():
    model = moved(quantised("4-bit"))
    bases = [layer.base_layer for _, layer in named_layers(model)]
    with torch.no_grad():
        theta_d(model).fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert [layer.base_layer for _, layer in named_layers(model)] == bases


def test_a_merged_weight_has_the_dtype_of_what_the_model_does_not_quantise():
    model = moved(quantised("8-bit", torch.bfloat16))
    merged = model.eval().merge_and_unload()
    assert {module.weight.dtype for module in merged.children()} == {torch.bfloat16}
    assert merged(x(torch.bfloat16)).dtype == torch.bfloat16
