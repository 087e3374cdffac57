"""Matrices of a model in any wrapper; those of an adapted model are those of the merged model."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from subspace_peft import Spectra, SubspaceConfig
from subspace_peft.spectra import matrices
from tests.cases import BY_NAME, CASES, wrap
from tests.models import MLP, ConvNet, Tied


def test_matrices_of_plain_models():
    model = ConvNet()
    weights = dict(matrices(model))
    assert {name: tuple(w.shape) for name, w in weights.items()} == {
        "conv1.weight": (4, 27), "conv2.weight": (6, 18), "head.weight": (5, 6)
    }  # fmt: skip
    assert torch.equal(weights["conv1.weight"], model.conv1.weight.reshape(4, 27))
    assert list(dict(matrices(model, r"conv\d.weight"))) == ["conv1.weight", "conv2.weight"]
    assert list(dict(matrices(nn.DataParallel(model), ["head.weight"]))) == ["head.weight"]
    assert list(dict(matrices(torch.compile(model, backend="eager"), ["head.weight"]))) == ["head.weight"]
    assert list(dict(matrices(Tied()))) == ["tokens.weight", "middle.weight"]
    inner = nn.Sequential(torch.compile(nn.Linear(2, 2), backend="eager"))
    assert list(dict(matrices(inner))) == ["0.weight"]


def test_weights_without_entries_are_passed_over():
    tensors = {"some": torch.ones(4, 3), "none": torch.ones(4, 0), "neither": torch.ones(0, 4)}
    assert [name for name, _ in matrices(tensors)] == ["some"]


@pytest.mark.parametrize("names", ["fc1", ["fc1.weight", "fc9.weight"], [], "fc1.bias"])
def test_unknown_names(names):
    with pytest.raises(ValueError, match=r"`names` must name matrices of the model, .* it has 2: fc1.weight, fc2.wei"):
        list(matrices(MLP(), names))
    with pytest.raises(ValueError, match="must have weights that are matrices to have spectra, this one has none"):
        Spectra(rank=1).add(BY_NAME["norms"].model())


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
@pytest.mark.parametrize("case", [case for case in CASES if case.name != "norms"], ids=str)
@pytest.mark.parametrize("coordinates", ["weight", "low_rank"])
def test_matrices_of_adapted_models_are_those_of_the_merged_model(case, coordinates):
    model = wrap(case, **({} if coordinates == "weight" else {"coordinates": "low_rank", "rank": 1}))
    before = dict(matrices(case.model()))
    start = dict(matrices(model))
    assert start.keys() == before.keys()
    assert all(torch.equal(start[name], before[name].to(start[name].dtype)) for name in before)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "theta_d" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    moved = dict(matrices(model))
    with model.disable_adapter():
        assert all(torch.equal(w, before[name]) for name, w in matrices(model))
    model.merge_adapter()
    for name, w in matrices(model):
        torch.testing.assert_close(w, moved[name].to(w.dtype), atol=1e-6, rtol=1e-5)
    model.unmerge_adapter()
    plain = dict(matrices(model.merge_and_unload()))
    assert any(not torch.equal(plain[name], before[name]) for name in plain)
    for name in plain:
        torch.testing.assert_close(plain[name], moved[name].to(plain[name].dtype), atol=1e-6, rtol=1e-5)


def test_increments_that_half_precision_would_round_away():
    config = SubspaceConfig(d=5, target_modules=["fc1"])
    model = get_peft_model(MLP().bfloat16(), config)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(1e-5)
    weight = dict(matrices(model, ["fc1.weight"]))["fc1.weight"]
    base = model.base_model.model.fc1.base_layer.weight
    assert weight.dtype == torch.float32
    assert 0 < (weight - base.float()).abs().max() < 1e-3


def test_matrices_of_heads_and_of_lora():
    model = get_peft_model(MLP(), SubspaceConfig(d=5, target_modules=["fc1"], modules_to_save=["fc2"]))
    with torch.no_grad():
        model.base_model.model.fc2.modules_to_save.default.weight.add_(1)
    weights = dict(matrices(model))
    assert list(weights) == ["fc1.weight", "fc2.weight"]
    assert torch.equal(weights["fc2.weight"], model.base_model.model.fc2.modules_to_save.default.weight)
    lora = get_peft_model(MLP(), LoraConfig(r=2, target_modules=["fc1"], init_lora_weights=False))
    weights = dict(matrices(lora))
    assert list(weights) == ["fc1.weight", "fc2.weight"]
    merged = dict(matrices(lora.merge_and_unload()))
    torch.testing.assert_close(weights["fc1.weight"], merged["fc1.weight"])
