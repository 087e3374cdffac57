"""SubspaceVectors: the names of theta_d, and its values and gradients under them."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from subspace_peft import fold
from tests.cases import BY_NAME, REPLACED, move, outputs, settings, theta_d, wrap


MLP = BY_NAME["mlp"]


D = sum(parameter.numel() for parameter in MLP.model().parameters())
KINDS = {
    "fastfood": {},
    "saved": {"save_projection": True},
    "basis": {"projection": "basis", "d": None, "basis": torch.eye(D)[:, ::9]},
    "coordinate": {"projection": "coordinate", "d": None, "mask": torch.arange(D) % 9 == 0},
    "svd": {**REPLACED, "target_modules": ["fc1", "fc2"]},
    "random": {**REPLACED, "target_modules": ["fc1", "fc2"], "start": "random"},
}


@pytest.mark.parametrize("is_loaded", [False, True], ids=["fresh", "loaded"])
@pytest.mark.parametrize("kind", [*KINDS, "folded"])
def test_an_adapter_is_copied_by_its_name_between_two_dots(kind, is_loaded, tmp_path):
    """As TRL makes a reference from a trained adapter, whatever its method is: with its config and its parameters."""
    model = wrap(MLP, **KINDS.get(kind, {}))
    move(model)
    if kind == "folded":
        fold(model)
    if is_loaded:
        model.save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(MLP.model(), tmp_path).eval()
    model.add_adapter("ref", model.peft_config["default"])
    names = [name for name, _ in model.named_parameters() if ".default." in name]
    assert names
    for name in names:
        model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(model.get_parameter(name))
    trained = outputs(model, MLP)
    model.set_adapter("ref")
    assert torch.equal(outputs(model, MLP), trained)


def test_a_state_dict_of_before_it_had_a_module_of_its_own_is_loaded():
    model = wrap(MLP)
    model.add_adapter("two", settings(seed=1))
    move(model)
    move(model, "two")
    old = {name.removesuffix(".vector"): tensor for name, tensor in model.state_dict().items()}
    assert "base_model.model.subspace_vectors.subspace_peft_theta_d.two" in old
    other = wrap(MLP)
    other.add_adapter("two", settings(seed=1))
    other.load_state_dict(old, strict=True)
    for adapter in ("default", "two"):
        assert torch.equal(theta_d(other, adapter), theta_d(model, adapter))


@pytest.mark.parametrize("trains", [True, False])
def test_a_vector_put_in_its_place_trains_if_it_did(trains):
    model = wrap(MLP)
    theta_d(model).requires_grad_(trains)
    vectors = model.base_model.model.subspace_vectors.subspace_peft_theta_d
    vectors["default"] = theta_d(model).double()
    assert theta_d(model).is_leaf
    assert theta_d(model).dtype == torch.float64
    assert theta_d(model).requires_grad == trains


@pytest.mark.filterwarnings("ignore:Adapter name .. should not be contained:UserWarning")
@pytest.mark.parametrize("name", ["", "a.b", "items", "vector", "spam_classifier"])
def test_names_that_torch_or_peft_take_for_something_else(name):
    changes = {"target_modules": ["query"], "task_type": "SEQ_CLS"} if "classifier" in name else {}
    case = BY_NAME["bert" if changes else "mlp"]
    with pytest.raises(ValueError, match=f"The name of an adapter must not .*, got '{name}'; choose another name"):
        wrap(case, name, **changes)


def test_names_that_are_those_of_modules(tmp_path):
    """PEFT leaves out what has another adapter's name between two dots."""
    case = BY_NAME["sequential"]
    base = nn.Sequential(*case.model(), nn.BatchNorm1d(2))
    model = get_peft_model(copy.deepcopy(base), settings(), adapter_name="0")
    model.add_adapter("3", settings(seed=1))
    move(model, "0")
    model(case.batch())  # its statistics move
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path / "0").eval()
    assert torch.equal(loaded(case.batch()), model.eval()(case.batch()))
