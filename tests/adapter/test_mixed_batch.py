"""Mixed batches: each sample of a batch with an adapter of its own."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from tests.adapter.test_several_adapters import several
from tests.cases import BY_NAME, base_outputs, move, outputs, replaced, settings


@pytest.fixture(params=["mlp", "convnet"])
def case(request):
    return BY_NAME[request.param]


def test_each_sample_runs_with_its_adapter(case):
    model = several(case)
    names = ["two", "__base__", "one"]
    mixed = outputs(model, case, adapter_names=names)
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                expected = outputs(model, case)
        else:
            model.set_adapter(name)
            expected = outputs(model, case)
        torch.testing.assert_close(mixed[i], expected[i], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("also", [["2"], None])
def test_modules_that_are_saved_whole_are_those_of_the_samples_adapter(also):
    """A head of each adapter, or the base's head for an adapter that has none."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    model = get_peft_model(network, settings(target_modules=["0"], modules_to_save=["2"], d=3), "one")
    model.add_adapter("two", settings(target_modules=["0"], modules_to_save=also, d=3, seed=1))
    for name, parameter in model.named_parameters():
        if "theta_d" in name or "modules_to_save" in name:
            parameter.data.normal_()
    model.eval()
    x, names = torch.randn(5, 4), ["one", "two", "__base__", "two", "one"]
    mixed = model(x, adapter_names=names)
    for name in ("one", "two"):
        model.set_adapter(name)
        rows = [i for i, other in enumerate(names) if other == name]
        torch.testing.assert_close(mixed[rows], model(x)[rows], rtol=1e-5, atol=1e-6)
    with model.disable_adapter():
        torch.testing.assert_close(mixed[2], model(x)[2], rtol=1e-5, atol=1e-6)


def test_wrong_mixed_batches(case):
    model = several(case)
    with pytest.raises(ValueError, match="name adapters of the model or '__base__', got the non-existing .* nobody"):
        outputs(model, case, adapter_names=["one", "one", "nobody"])
    for names in (["one", "two"], ["one", "one"], ["one"] * 4, []):
        expected = rf"must have one name for each sample .* got {len(names)} names for .*\[3, .*; give as many"
        with pytest.raises(ValueError, match=expected):
            outputs(model, case, adapter_names=names)
    with pytest.raises(ValueError, match="needs a model in evaluation mode, got training mode; call"):
        outputs(model.train(), case, adapter_names=["one", "two", "one"])
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="needs adapters that are neither merged nor disabled; unmerge or enable"):
        outputs(model, case, adapter_names=["one", "two", "one"])


def test_outputs_that_are_no_samples():
    class Mean(nn.Linear):
        def forward(self, x):
            return super().forward(x).mean(0, keepdim=True)

    model = get_peft_model(nn.Sequential(Mean(4, 2)), settings()).eval()
    with pytest.raises(ValueError, match="needs outputs that can be split into samples .* those of .*Mean.* cannot"):
        model(torch.randn(3, 4), adapter_names=["default", "default", "__base__"])


def test_a_replaced_weight_in_a_mixed_batch():
    case = BY_NAME["mlp"]
    model = replaced("mlp")
    move(model, size=0.3)
    alone = outputs(model, case)
    mixed = outputs(model, case, adapter_names=["default", "__base__", "default"])
    torch.testing.assert_close(mixed, torch.stack([alone[0], base_outputs(case)[1], alone[2]]), rtol=1e-4, atol=1e-4)


def test_names_of_several_sequences_for_each_sample():
    """As many as `generate` returns, also where they are the same."""
    model = get_peft_model(BY_NAME["llama"].model(), settings(target_modules="all-linear"), "one").eval()
    model.add_adapter("two", settings(target_modules="all-linear", seed=1))
    batch = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]]), "max_new_tokens": 2}
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "theta_d" in name:
            parameter.data.normal_()
    batch |= {"do_sample": True, "num_return_sequences": 2}
    for names in (["one"] * 4, ["one", "one", "two", "two"]):
        torch.manual_seed(0)
        found = model.generate(**batch, adapter_names=names)
        torch.manual_seed(0)
        alone = model.generate(**batch)
        assert torch.equal(found[:2], alone[:2])
        assert torch.equal(found, alone) == (names[-1] == "one")


def test_equal_names_where_time_is_before_the_batch():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 2)), settings()).eval()
    x = torch.randn(7, 3, 4)
    assert torch.equal(model(x, adapter_names=["default"] * 3), model(x))
