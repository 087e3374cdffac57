"""Several adapters on one model: made, loaded, chosen, deleted."""

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_layer_status, get_model_status, get_peft_model
from peft.utils.hotswap import hotswap_adapter

from subspace_peft import SubspaceConfig
from subspace_peft.adapter.walk import find_vectors, named_layers, unique_coordinates
from tests.cases import (
    BY_NAME,
    REPLACED,
    Case,
    move,
    outputs,
    product_base,
    refused,
    replaced,
    settings,
    tensors,
    theta_d,
    train,
    wrap,
)


ADAPTERS = {
    "one": {"d": 7, "seed": 1},
    "two": {"d": 5, "seed": 2, "projection": "sparse"},
    "three": {"d": 9, "seed": 2, "projection": "dense", "target_modules": ["fc2", "head"]},
    "low": {"d": 6, "coordinates": "low_rank", "rank": 2, "parameters": ["weight"]},
}


def several(case: Case) -> PeftModel:
    """The case's model with all ADAPTERS, each moved, the first one active."""
    names = list(ADAPTERS)
    model = wrap(case, names[0], **ADAPTERS[names[0]])
    for name in names[1:]:
        model.add_adapter(name, settings(**ADAPTERS[name]))
    for i, name in enumerate(names):
        move(model, name, size=0.3, seed=i)
    return model.eval()


def alone(case: Case, name: str) -> torch.Tensor:
    """The outputs of the case's model with this adapter and no other."""
    model = wrap(case, name, **ADAPTERS[name])
    move(model, name, size=0.3, seed=list(ADAPTERS).index(name))
    return outputs(model, case)


@pytest.fixture(params=["mlp", "convnet"])
def case(request):
    return BY_NAME[request.param]


@pytest.fixture
def model(case):
    return several(case)


def test_each_acts_as_if_alone(case, model):
    results = []
    for name in ADAPTERS:
        model.set_adapter(name)
        results.append(outputs(model, case))
        assert torch.equal(results[-1], alone(case, name))
    assert not any(torch.equal(x, y) for i, x in enumerate(results) for y in results[:i])


def test_only_the_active_one_trains(case, model):
    model.set_adapter("two")
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "base_model.model.subspace_vectors.subspace_peft_theta_d.two.vector"
    ]
    before = {name: theta_d(model, name).clone() for name in ADAPTERS}
    train(model, case)
    assert [name for name in ADAPTERS if not torch.equal(theta_d(model, name), before[name])] == ["two"]


def test_an_adapter_for_inference_does_not_train(model):
    model.set_adapter("two", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())


def test_deleting(case, model):
    model.set_adapter("two")
    model.delete_adapter("one")
    assert torch.equal(outputs(model, case), alone(case, "two"))
    assert "one" not in model.peft_config
    for module in model.modules():
        for value in vars(module).values():
            assert not (isinstance(value, dict) and "one" in value)
    assert not any(name.endswith(".one") for name in model.state_dict())
    with pytest.warns(UserWarning, match="two was active which is now deleted. Setting active adapter to"):
        model.delete_adapter("two")
    assert model.active_adapter in ("three", "low")
    model.add_adapter("one", settings(**ADAPTERS["two"]))
    model.set_adapter("one")
    move(model, "one", size=0.3, seed=1)
    assert torch.equal(outputs(model, case), alone(case, "two"))


def test_one_name_serves_one_adapter(case, model):
    before = outputs(model, case)
    with refused(model, "'one'|already exists"):
        model.add_adapter("one", settings())
    assert torch.equal(outputs(model, case), before)


def test_all_are_saved_and_loaded(case, model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.model(), tmp_path / "one", adapter_name="one")
    for name in ("two", "three", "low"):
        loaded.load_adapter(tmp_path / name, name)
    loaded.eval()
    for name in ADAPTERS:
        loaded.set_adapter(name)
        assert torch.equal(outputs(loaded, case), alone(case, name))


def test_a_loaded_adapter_can_train_on(case, model, tmp_path):
    model.save_pretrained(tmp_path)
    assert not theta_d(
        PeftModel.from_pretrained(case.model(), tmp_path / "one", adapter_name="one"), "one"
    ).requires_grad
    loaded = PeftModel.from_pretrained(case.model(), tmp_path / "one", adapter_name="one", is_trainable=True)
    before = theta_d(loaded, "one").clone()
    train(loaded, case)
    assert not torch.equal(theta_d(loaded, "one"), before)


def test_an_adapter_that_is_named_twice_acts_once():
    case = BY_NAME["mlp"]
    model = wrap(case, init_weights=False)
    expected = outputs(model, case)
    model.base_model.set_adapter(["default", "default"])
    torch.testing.assert_close(outputs(model, case), expected)
    model.merge_adapter(["default", "default"])
    torch.testing.assert_close(outputs(model, case), expected)


def test_unknown_adapters_are_not_merged():
    model = wrap(BY_NAME["mlp"])
    for merge in (model.merge_adapter, lambda names: model.merge_and_unload(adapter_names=names)):
        with pytest.raises(ValueError, match="must be adapters of the model, got 'zz'; it has default"):
            merge(["zz"])
    assert any(named_layers(model))


def test_status(model):
    status = get_model_status(model)
    assert status.adapter_model_type == "SubspaceModel"
    assert status.peft_types == dict.fromkeys(ADAPTERS, "SUBSPACE_PEFT")
    assert status.enabled is True
    assert status.active_adapters == ["one"]
    assert status.merged_adapters == []
    assert status.requires_grad == {name: name == "one" for name in ADAPTERS}
    assert status.available_adapters == sorted(ADAPTERS)
    layers = {layer.name: layer.module_type for layer in get_layer_status(model)}
    assert layers.pop("model.subspace_vectors") == "SubspaceVectors"
    assert set(layers.values()) == {"subspace_peft.SubspaceLayer"}


def test_printed_parameters(capsys):
    wrap(BY_NAME["mlp"]).print_trainable_parameters()
    assert capsys.readouterr().out == "trainable params: 7 || all params: 121 || trainable%: 5.7851\n"


def test_hotswapping_is_refused_by_peft(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but SUBSPACE_PEFT was passed"):
        hotswap_adapter(model, tmp_path / "one", "one")


@pytest.mark.parametrize(
    "other",
    [LoraConfig(r=2), AdaLoraConfig(init_r=2, target_r=1, total_step=9)],
)
@pytest.mark.filterwarnings("ignore:You are trying to modify", "ignore:Already found a .peft_config")
def test_a_module_holds_adapters_of_one_type(other):
    other.target_modules = {"fc1"}
    ours = SubspaceConfig(**{**REPLACED, "target_modules": ["fc1"]})
    theirs = get_peft_model(BY_NAME["mlp"].model(), other)
    with pytest.raises(ValueError, match="adapters of one PEFT type"):
        get_peft_model(theirs.base_model.model, ours)
    model = replaced("mlp")
    with refused(model, "Cannot combine adapters with different peft types"):
        model.add_adapter("theirs", other)


def test_a_replaced_weight_and_adapters_that_add_to_it():
    case = BY_NAME["mlp"]
    model = replaced("mlp")
    move(model, size=0.3)
    alone = outputs(model, case)
    model.add_adapter("added", SubspaceConfig(d=5, target_modules=["fc1", "fc2"]))
    model.add_adapter("other", SubspaceConfig(**{**REPLACED, "target_modules": ["fc1"], "start": "random"}))
    move(model, "added", size=0.3)
    assert torch.equal(outputs(model, case), alone)
    model.base_model.set_adapter(["default", "added"])
    both = outputs(model, case)
    plain = product_base("mlp", model)
    with torch.no_grad():
        z = find_vectors(model).normalised("added")
        for path, coordinates in unique_coordinates(model, "added").items():
            plain.get_parameter(path).add_(coordinates.increment(z))
    torch.testing.assert_close(both, outputs(plain, case), rtol=1e-4, atol=1e-4)
    model.base_model.set_adapter(["added", "default"])
    torch.testing.assert_close(outputs(model, case), both, rtol=1e-4, atol=1e-4)
    before = tensors(model)
    model.merge_adapter(["added", "default"])
    torch.testing.assert_close(outputs(model, case), both, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    for name, tensor in model.state_dict().items():  # unmerging subtracts from biases, which rounds
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0 if name.endswith("weight") else 1e-6)
    model.load_state_dict(before)
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="At most one active adapter can replace a weight"):
        outputs(model, case)
    with refused(model, "At most one active adapter can replace a weight"):
        model.merge_adapter(["default", "other"])
    model.set_adapter("default")
    assert torch.equal(outputs(model, case), alone)
    model.delete_adapter("other")
    assert torch.equal(outputs(model, case), alone)
