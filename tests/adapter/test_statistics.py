"""Statistics of batch norms: the base's are left alone, and each adapter has its own."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from torch import nn

from subspace_peft.adapter.layer import SubspaceLayer
from tests.cases import (
    BY_NAME,
    assert_same_state,
    base_outputs,
    move,
    outputs,
    settings,
    tensors,
    theta_d,
    train,
    wrap,
)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class TestBatchNorm:
    """Statistics belong to the adapter, also where it does not move the weights of the batch norm."""

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
        """An untrained twin sees the same batches at theta_d = 0, and its statistics are those of torch."""
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

    def test_training_adds_no_key_to_the_file(self, model):
        untrained = wrap(self.case, target_modules=model.peft_config["default"].target_modules)
        assert list(get_peft_model_state_dict(untrained)) == list(get_peft_model_state_dict(model))

    def test_a_file_without_them_stands_for_the_bases(self, tmp_path):
        """Version 0.1 saved them only where training had changed them."""
        model = wrap(self.case)
        move(model)
        model.save_pretrained(tmp_path)
        file = tmp_path / "adapter_model.safetensors"
        save_file({key: t for key, t in load_file(file).items() if "running" not in key and "num" not in key}, file)
        loaded = PeftModel.from_pretrained(self.case.model(), tmp_path).eval()
        assert torch.equal(outputs(loaded, self.case), outputs(model, self.case))

    def test_merge_takes_them_and_unmerge_gives_them_back(self, model):
        adapted = outputs(model, self.case)
        model.merge_adapter()
        close(outputs(model, self.case), adapted)
        model.unmerge_adapter()
        buffers = dict(self.case.model().named_buffers())
        wrapped = model.base_model.model.state_dict()
        for name, buffer in buffers.items():
            owner, _, statistic = name.rpartition(".")
            assert torch.equal(wrapped[f"{owner}.base_layer.{statistic}"], buffer), name
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


def test_the_statistics_of_the_last_merged_adapter_count():
    case = BY_NAME["convnet"]
    model = wrap(case)
    train(model, case)
    model.add_adapter("other", settings(seed=1))
    model.base_model.set_adapter(["other", "default"])
    train(model, case)
    live = outputs(model, case)
    model.merge_adapter(["other", "default"])
    torch.testing.assert_close(outputs(model, case), live, rtol=1e-4, atol=1e-4)


def test_a_batch_norm_of_modules_to_save_is_left_to_peft():
    case = BY_NAME["convnet"]
    model = wrap(case, target_modules=["conv1", "conv2"], modules_to_save=["bn1", "head"])
    assert isinstance(model.base_model.model.bn1, ModulesToSaveWrapper)
    assert isinstance(model.base_model.model.bn2, SubspaceLayer)
    train(model, case)
    assert torch.isfinite(outputs(model, case)).all()


def test_a_batch_norm_under_two_names_has_one_set_of_statistics(tmp_path):
    def build():
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(4)
        return nn.Sequential(nn.Linear(4, 4), norm, nn.Linear(4, 4), norm)

    x, base = torch.randn(16, 4), build()
    model = get_peft_model(build(), settings(target_modules=["0"]))
    inner = model.base_model.model
    assert inner[1] is inner[3]
    with torch.no_grad():
        assert torch.equal(model(x), base(x))
        assert torch.equal(model.eval()(x), base.eval()(x))
    model.save_pretrained(tmp_path)
    assert sum("running" in name for name in load_file(tmp_path / "adapter_model.safetensors")) == 2
    loaded = PeftModel.from_pretrained(build(), tmp_path).eval()
    assert torch.equal(loaded(x), model(x))
    model.add_adapter("other", settings(target_modules=["1"]))
    assert inner[1] is inner[3]
    adapted = model(x)
    plain = model.merge_and_unload()
    assert type(plain[1]) is nn.BatchNorm1d
    assert plain[1] is plain[3]
    torch.testing.assert_close(plain(x), adapted)


class TestWhoeverTouchesThem:
    """The statistics in use are the buffers of the batch norm itself."""

    case = BY_NAME["convnet"]

    @pytest.fixture
    def model(self):
        model = wrap(self.case)
        train(model, self.case, steps=3)
        return model

    def test_update_bn_computes_those_of_the_adapter(self, model):
        """As for a plain model with the moved tensors, and the base's stay."""
        plain = copy.deepcopy(model).merge_and_unload()
        loader = [self.case.batch() + i for i in range(3)]
        for net in (model, plain):
            torch.optim.swa_utils.update_bn(loader, net)
        close(outputs(model.eval(), self.case), outputs(plain.eval(), self.case))
        with model.disable_adapter():
            assert torch.equal(outputs(model, self.case), base_outputs(self.case))

    def test_a_batch_norm_can_be_told_to_do_without(self, model):
        plain = copy.deepcopy(model).merge_and_unload()
        for net in (model, plain):
            for module in net.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.track_running_stats = False
                    module.running_mean = module.running_var = None
        assert not torch.allclose(outputs(plain, self.case), outputs(wrap(self.case), self.case))
        close(outputs(model, self.case), outputs(plain, self.case))

    @pytest.mark.parametrize("convert", [lambda m: m.double().float(), copy.deepcopy])
    def test_they_stay_one_set_after_conversions_and_copies(self, model, convert):
        expected = outputs(model, self.case)
        model = convert(model)
        close(outputs(model, self.case), expected)
        train(model, self.case)
        trained = outputs(model, self.case)
        with model.disable_adapter():
            close(outputs(model, self.case), base_outputs(self.case))
        assert torch.equal(outputs(model, self.case), trained)

    def test_new_buffers_in_the_batch_norm_are_saved(self, model, tmp_path):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean = module.running_mean + 1
        expected = outputs(model, self.case)
        model.save_pretrained(tmp_path)
        assert torch.equal(outputs(PeftModel.from_pretrained(self.case.model(), tmp_path).eval(), self.case), expected)

    def test_an_adapter_trained_on_a_frozen_one_leaves_its_statistics(self, model):
        alone = outputs(model, self.case)
        model.add_adapter("other", settings(seed=4))
        model.base_model.set_adapter(["default", "other"])
        theta_d(model).requires_grad_(False)
        train(model, self.case)
        model.set_adapter("default")
        assert torch.equal(outputs(model, self.case), alone)

    def test_a_state_dict_holds_each_set_under_its_own_name(self, model):
        expected, state = outputs(model, self.case), tensors(model)
        assert torch.equal(state["base_model.model.bn1.base_layer.running_mean"], torch.zeros(4))
        twin = wrap(self.case)
        twin.load_state_dict(state)
        assert torch.equal(outputs(twin, self.case), expected)
        with twin.disable_adapter():
            assert torch.equal(outputs(twin, self.case), base_outputs(self.case))
        assert_same_state(twin, state)


class Frozen(nn.Module):
    """As in detectors: statistics that no training changes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.randn(4))
        self.register_buffer("running_var", torch.rand(4))

    def forward(self, x):
        return (x - self.running_mean) * (self.running_var + 1e-5).rsqrt()


def test_a_frozen_batch_norm_has_the_bases_statistics_and_none_are_saved():
    base = nn.Sequential(nn.Linear(3, 4), Frozen())
    model = get_peft_model(base, settings(d=5, target_modules=["0"]))
    assert isinstance(model.base_model.model[1], Frozen)
    assert not [key for key in get_peft_model_state_dict(model) if "running" in key]
