"""Merging and unmerging: what is not finite, several adapters at once, tied and replaced weights."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from subspace_peft import SubspaceConfig
from subspace_peft.coordinates.starts import STARTS
from tests.cases import (
    BY_NAME,
    assert_same_state,
    base_outputs,
    move,
    outputs,
    refused,
    replaced,
    settings,
    tensors,
    theta_d,
    wrap,
)
from tests.trajectory.walks import Allocations


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mlp", "convnet", "embeddings", "recurrent", "attention"])
def test_safe_merge_finds_what_is_not_finite(name):
    case = BY_NAME[name]
    model = wrap(case)
    with torch.no_grad():
        theta_d(model)[0] = float("nan")
    before = tensors(model)
    with pytest.raises(ValueError, match="NaNs detected in the merged weights. The adapter default"):
        model.merge_adapter(safe_merge=True)
    del before["base_model.model.subspace_vectors.subspace_peft_theta_d.default.vector"]
    after = tensors(model)
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_two_adapters_merge_into_their_sum():
    case = BY_NAME["mlp"]
    model = wrap(case, "one")
    model.add_adapter("two", settings(seed=1, d=5))
    move(model, "one", seed=1)
    move(model, "two", seed=2)
    model.base_model.set_adapter(["one", "two"])
    both = outputs(model, case)
    model.merge_adapter(["one", "two"])
    close(outputs(model, case), both)
    model.unmerge_adapter()
    plain = model.merge_and_unload(adapter_names=["one"])
    model = wrap(case, "one")
    move(model, "one", seed=1)
    close(outputs(plain, case), outputs(model, case))


def test_a_merged_adapter_is_not_merged_twice():
    case = BY_NAME["mlp"]
    model = wrap(case)
    move(model)
    model.merge_adapter()
    once = outputs(model, case)
    with pytest.warns(UserWarning, match="(?i)already merged"):
        model.merge_adapter()
    assert torch.equal(outputs(model, case), once)


@pytest.mark.filterwarnings("ignore:Model .*tie:UserWarning")
def test_a_tied_weight_is_merged_once_and_stays_tied():
    case = BY_NAME["gpt2"]
    model = wrap(case)
    move(model, size=0.5)
    adapted = outputs(model, case)
    plain = model.merge_and_unload()
    close(outputs(plain, case), adapted)
    assert plain.lm_head.weight is plain.transformer.wte.weight


def test_disabling_unmerges_every_layer_first():
    case = BY_NAME["tied"]
    model = wrap(case)
    move(model)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(outputs(model, case), base_outputs(case), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------- of replaced weights


@pytest.mark.filterwarnings("ignore:Model .*tie:UserWarning")
@pytest.mark.parametrize("name", ["convnet", "tied", "gpt2"])
@pytest.mark.parametrize("start", STARTS)
def test_the_base_comes_back(start, name):
    case = BY_NAME[name]
    model = replaced(name, start=start)
    move(model)
    before, weights = outputs(model, case), tensors(model)
    with model.disable_adapter():
        assert torch.equal(outputs(model, case), base_outputs(case))
    model.merge_adapter()
    torch.testing.assert_close(outputs(model, case), before, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(outputs(model, case), base_outputs(case))
    model.merge_adapter()
    model.unmerge_adapter()
    assert_same_state(model, weights)
    assert torch.equal(outputs(model, case), before)
    plain = model.unload()
    assert torch.equal(outputs(plain, case), base_outputs(case))


def test_a_merge_that_is_refused_changes_nothing():
    model = replaced("mlp")
    with torch.no_grad():
        theta_d(model).fill_(torch.inf)
    with refused(model, "NaNs detected in the merged weights. The adapter default seems to be broken"):
        model.merge_adapter(safe_merge=True)
    assert model.base_model.model.fc1.replaced_origins == {}


def test_a_refused_merge_keeps_the_origins_of_what_is_merged():
    """The first adapter, which replaces the weight, stays merged; unmerging gives the base back to the last bit."""
    model = replaced("mlp")
    model.add_adapter("broken", settings(target_modules=["fc1"], parameters=["weight"]))
    with torch.no_grad():
        theta_d(model, "broken").fill_(torch.inf)
    before = tensors(model)
    with pytest.raises(ValueError, match="The adapter broken seems to be broken"):
        model.merge_adapter(["default", "broken"], safe_merge=True)
    assert model.base_model.model.fc1.merged_adapters == ["default"]
    model.unmerge_adapter()
    assert_same_state(model, before)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_tensors_are_merged_one_by_one(safe_merge):
    """Beside the merged weights themselves, memory for one increment at a time."""
    base = nn.Sequential(nn.LSTM(64, 64, num_layers=3))
    model = get_peft_model(base, SubspaceConfig(d=9, projection="dense", target_modules=["0"]))
    largest, total = 4 * 4 * 64 * 64, 4 * sum(parameter.numel() for parameter in base.parameters())
    with Allocations() as allocations:
        model.merge_adapter(safe_merge=safe_merge)
    assert allocations.peak < total + 3 * largest
