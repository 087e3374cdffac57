"""The file of an adapter that replaces weights: it holds the start of the factors."""

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from subspace_peft.adapter.walk import unique_coordinates
from subspace_peft.coordinates.starts import STARTS
from tests.cases import BY_NAME, move, outputs, replaced, train


@pytest.mark.parametrize("projection", ["fastfood", "fastjl", "kronecker", "sparse", "dense", "identity"])
@pytest.mark.parametrize("start", STARTS)
def test_save_and_load(start, projection, tmp_path):
    case = BY_NAME["convnet"]
    changes = {"projection": projection, "d": None if projection == "identity" else 9}
    model = replaced("convnet", start=start, **changes)
    train(model, case)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(PeftModel.from_pretrained(case.model(), tmp_path).eval(), case), outputs(model, case))


@pytest.mark.parametrize("start", STARTS)
def test_the_start_is_that_of_the_file(start, tmp_path):
    """It counts even if the base has other weights or the SVD gives other signs on another machine."""
    case = BY_NAME["mlp"]
    model = replaced("mlp", start=start)
    move(model)
    model.save_pretrained(tmp_path)
    base = case.model()
    with torch.no_grad():
        base.fc1.weight.mul_(-1.5)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(outputs(loaded, case), outputs(model, case))


def test_a_file_without_the_start_is_refused(tmp_path):
    case = BY_NAME["mlp"]
    replaced("mlp").save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    key = next(key for key in state if "start.fc1" in key and key.endswith(".B"))
    save_file({k: t for k, t in state.items() if "start.fc1" not in k}, file)
    with pytest.raises(
        ValueError, match="start of the factors of each replaced weight and no other, but lacks that of `fc1.weight`"
    ):
        PeftModel.from_pretrained(case.model(), tmp_path)
    save_file({**state, key: state[key][:3].clone()}, file)
    with pytest.raises(ValueError, match="start of `fc1.weight` in the adapter file must be"):
        PeftModel.from_pretrained(case.model(), tmp_path)
    save_file({**state, key.replace("fc1", "fc9"): state[key].clone()}, file)
    with pytest.raises(
        ValueError, match="start of the factors of each replaced weight and no other, but holds that of `fc9.weight`"
    ):
        PeftModel.from_pretrained(case.model(), tmp_path)


def test_the_file_is_as_small_as_the_start_allows(tmp_path):
    sizes = {}
    for start in STARTS:
        model = replaced("llama", start=start)
        model.save_pretrained(tmp_path / start)
        sizes[start] = sum(t.numel() for t in load_file(tmp_path / start / "adapter_model.safetensors").values())
    count = len(unique_coordinates(replaced("llama"), "default"))
    assert sizes["orthogonal"] == sizes["random"] == 9 + 8 + count
    assert sizes["svd"] == 9 + 8 + replaced("llama").base_model.D


def test_factors_of_another_kind_are_not_loaded():
    saved = get_peft_model_state_dict(replaced("mlp", start="random"))
    with pytest.raises(ValueError, match="must belong to the adapter it is loaded into"):
        set_peft_model_state_dict(replaced("mlp", start="orthogonal"), saved)
