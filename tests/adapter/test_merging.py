"""Merging, unmerging and unloading beyond the matrix: NaN, several at once, statistics of batch norm."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

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
    train,
    wrap,
)


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
    del before["base_model.model.subspace_vectors.subspace_peft_theta_d.default"]
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


class TestBatchNorm:
    """Statistics belong to the adapter, also those of batch norms whose weights it does not move."""

    case = BY_NAME["convnet"]

    @pytest.fixture(params=["all", "conv1"])
    def model(self, request):
        targets = "all" if request.param == "all" else [request.param]
        model = wrap(self.case, target_modules=targets)
        train(model, self.case, steps=3)
        return model

    def test_training_leaves_the_bases_alone(self, model):
        base = self.case.model()
        with model.disable_adapter():
            assert torch.equal(outputs(model, self.case), base_outputs(self.case))
        assert not torch.equal(outputs(model, self.case), base_outputs(self.case))
        assert_same_state(model.unload(), tensors(base))

    def test_they_are_those_of_full_training(self, model):
        """An untrained twin sees the same batches with theta_d = 0: its statistics are what torch would make."""
        twin, base = wrap(self.case, target_modules=["conv1"]), self.case.model().train()
        twin.train()
        for _ in range(2):
            outputs(twin, self.case)
            outputs(base, self.case)
        assert torch.equal(outputs(twin.eval(), self.case), outputs(base.eval().requires_grad_(False), self.case))

    def test_they_are_saved(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(self.case.model(), tmp_path).eval()
        assert torch.equal(outputs(loaded, self.case), outputs(model, self.case))
        assert sum("running" in key for key in load_file(tmp_path / "adapter_model.safetensors")) == 4

    def test_unchanged_ones_are_not_saved(self, tmp_path):
        model = wrap(self.case)
        move(model)
        model.save_pretrained(tmp_path)
        assert not any("running" in key for key in load_file(tmp_path / "adapter_model.safetensors"))

    def test_merge_takes_them_and_unmerge_gives_them_back(self, model):
        adapted = outputs(model, self.case)
        model.merge_adapter()
        close(outputs(model, self.case), adapted)
        model.unmerge_adapter()
        buffers = dict(self.case.model().named_buffers())
        held = dict(model.base_model.model.named_buffers())
        for name, buffer in buffers.items():
            owner, _, statistic = name.rpartition(".")
            assert torch.equal(held[f"{owner}.base_layer.{statistic}"], buffer), name
        assert torch.equal(outputs(model, self.case), adapted) or torch.allclose(outputs(model, self.case), adapted)
        plain = model.merge_and_unload()
        close(outputs(plain, self.case), adapted)

    def test_each_adapter_has_its_own(self, model):
        adapted = outputs(model, self.case)
        model.add_adapter("other", settings(seed=4))
        model.set_adapter("other")
        assert torch.equal(outputs(model.eval(), self.case), base_outputs(self.case))
        train(model, self.case)
        model.set_adapter("default")
        assert torch.equal(outputs(model, self.case), adapted)


def test_statistics_are_saved_while_merged(tmp_path):
    case = BY_NAME["convnet"]
    model = wrap(case)
    train(model, case)
    expected = outputs(model, case)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    model.unmerge_adapter()
    loaded = PeftModel.from_pretrained(case.model(), tmp_path).eval()
    torch.testing.assert_close(outputs(loaded, case), expected)


def test_of_several_merged_adapters_the_first_ones_statistics_count():
    case = BY_NAME["convnet"]
    model = wrap(case)
    train(model, case)
    model.add_adapter("other", settings(seed=1))
    model.base_model.set_adapter(["other", "default"])
    train(model, case)
    live = outputs(model, case)
    model.merge_adapter(["other", "default"])
    torch.testing.assert_close(outputs(model, case), live, rtol=1e-4, atol=1e-4)


def test_disabling_unmerges_every_layer_first():
    case = BY_NAME["tied"]
    model = wrap(case)
    move(model)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(outputs(model, case), base_outputs(case), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------- of replaced weights


@pytest.mark.filterwarnings("ignore:Model .*tie:UserWarning", "ignore:Setting .save_embedding_layers")
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
    with refused(model, "NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert model.base_model.model.fc1._replaced == {}
