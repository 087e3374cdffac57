"""The adapter's file: what it holds, and what happens when it is damaged or belongs to another model."""

import json
from collections import OrderedDict

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from subspace_peft.adapter.walk import find_vectors
from tests.cases import BY_NAME, Case, dense_P, move, outputs, refused, settings, train, wrap


CASE = BY_NAME["mlp"]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
OWN = "base_model.model"
THETA_D = f"{OWN}.subspace_vectors.subspace_peft_theta_d"


@pytest.fixture
def folder(tmp_path):
    model = wrap(CASE)
    train(model, CASE)
    model.save_pretrained(tmp_path)
    return tmp_path


def load(folder, model=None, **kwargs):
    return PeftModel.from_pretrained(CASE.model() if model is None else model, folder, **kwargs)


def rewrite(folder, change):
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS)


def configure(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def test_its_content(folder):
    state = load_file(folder / WEIGHTS)
    assert state[THETA_D].shape == (7,)
    assert sum(tensor.numel() for tensor in state.values()) == 7 + 8  # theta_d and the mark of P
    config = json.loads((folder / CONFIG).read_text())
    assert config["D"] == 114
    assert len(config["fingerprint"]) == 8 * 4
    assert config["subspace_peft_version"]
    assert config["projection_version"] == 1


@pytest.mark.parametrize("projection", ["dense", "sparse", "fastfood", "fastjl", "kronecker"])
@pytest.mark.parametrize("coordinates", ["weight", "low_rank"])
def test_a_saved_projection_is_used(projection, coordinates, tmp_path):
    changes = {"coordinates": "low_rank", "rank": 2} if coordinates == "low_rank" else {}
    model = wrap(CASE, projection=projection, save_projection=True, **changes)
    train(model, CASE)
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / WEIGHTS)) > 2
    assert torch.equal(outputs(load(tmp_path).eval(), CASE), outputs(model, CASE))


@pytest.mark.parametrize("projection", ["dense", "sparse", "fastfood", "fastjl", "kronecker"])
def test_a_saved_projection_is_what_acts(projection, tmp_path):
    """Outputs stay the same with another seed in the config, and without the mark that would refuse it."""
    model = wrap(CASE, projection=projection, save_projection=True)
    move(model)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda state: state.pop("base_model.model.subspace_vectors.subspace_peft_identity"))
    configure(tmp_path, seed=99)
    loaded = load(tmp_path).eval()
    for name, P in dense_P(loaded).items():
        torch.testing.assert_close(P, dense_P(model)[name])
    assert torch.equal(outputs(loaded, CASE), outputs(model, CASE))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda model: setattr(model, "fc2", nn.Linear(10, 5)), "differs is `fc2.weight` of shape \\[5, 10\\]"),
        (lambda model: setattr(model, "fc1", nn.Linear(6, 10, bias=False)), "differs is `fc2.weight`"),
        (lambda model: setattr(model, "fc2", nn.Linear(10, 4, bias=False)), "ends after `fc2.weight`.* had 1 more"),
    ],
    ids=["shape", "missing", "short"],
)
def test_another_base_is_refused(folder, other, message):
    base = CASE.model()
    other(base)
    with refused(base, message):
        load(folder, base)


def test_a_newer_projection_version_is_refused(folder):
    configure(folder, projection_version=2)
    with pytest.raises(ValueError, match="`projection_version` must be at most 1.*got 2.*upgrade subspace_peft"):
        load(folder)


@pytest.mark.parametrize("keep", [0, 4, 40, -4])
def test_a_truncated_file_is_refused(folder, keep):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:keep])
    with pytest.raises(SafetensorError):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.update({THETA_D: torch.zeros(6)}),
            "theta_d in the adapter file must be 7 floating numbers.*of shape \\[6\\]",
        ),
        (lambda s: s.update({THETA_D: torch.zeros(7, dtype=torch.int64)}), "must be 7 floating numbers.*torch.int64"),
        (lambda s: s.update({THETA_D.replace("theta_d", "theta_e"): torch.zeros(7)}), "no version of .* writes"),
        (lambda s: s.pop(THETA_D), "must hold theta_d, but does not; it is damaged"),
        (lambda s: s.update({f"{OWN}.fc1.subspace_peft_running_mean": torch.zeros(10)}), "no batch norm for `.*fc1"),
        (lambda s: s.update({f"{OWN}.fc1.subspace_peft_P": torch.zeros(10)}), "no batch norm for `.*subspace_peft_P"),
        (lambda s: s.update({THETA_D.replace("theta_d", "P.fc3.weight/0"): torch.zeros(1)}), "tensor `fc3.weight`"),
    ],
    ids=["shape", "dtype", "key", "missing", "statistic", "ours", "rows"],
)
def test_a_tampered_file_is_refused(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(ValueError, match=message):
        load(folder)


@pytest.mark.parametrize("change", [{"seed": 1}, {"projection": "dense"}, {"normalization": "columns"}], ids=str)
def test_the_two_files_must_belong_together(folder, change):
    configure(folder, **change)
    with pytest.raises(ValueError, match="must belong to the adapter it is loaded into"):
        load(folder)


def test_theta_d_of_another_projection_is_refused():
    model = wrap(CASE)
    state = {}
    for seed in (0, 1):
        state[seed] = get_peft_model_state_dict(wrap(CASE, seed=seed))
    set_peft_model_state_dict(model, state[0])
    with pytest.raises(ValueError, match="another seed, d, projection or base"):
        set_peft_model_state_dict(model, state[1])


def test_nothing_is_unpickled(folder):
    (folder / WEIGHTS).unlink()
    torch.save({THETA_D: torch.zeros(7)}, folder / WEIGHTS)
    with pytest.raises(SafetensorError):
        load(folder)


def test_the_scale_is_not_saved_but_computed_again(folder):
    loaded = load(folder)
    assert find_vectors(loaded).scales["default"] == find_vectors(wrap(CASE)).scales["default"]


def test_a_second_adapter_on_another_base_is_refused_and_forgotten(folder):
    base = CASE.model()
    base.fc2 = nn.Linear(10, 5)
    model = get_peft_model(base, settings())
    with refused(model, "differs is `fc2.weight`"):
        model.load_adapter(folder, "other")
    assert set(model.peft_config) == {"default"}


class NormInside(nn.Module):
    """A batch norm in a module that owns a parameter."""

    def __init__(self):
        super().__init__()
        self.gain, self.norm = nn.Parameter(torch.ones(6)), nn.BatchNorm1d(6)

    def forward(self, x):
        return self.norm(x * self.gain)


@pytest.mark.parametrize("saved_with", [["outer", "norm"], ["norm"]], ids=["nested", "alone"])
def test_statistics_have_one_name_whatever_is_wrapped_around(saved_with, tmp_path):
    case = Case("norm_inside", lambda: nn.Sequential(OrderedDict(outer=NormInside())), lambda: torch.randn(8, 6))
    model = wrap(case, target_modules=["norm"])
    if "outer" in saved_with:
        model.add_adapter("around", settings(target_modules=["outer"], d=3))
    train(model, case)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    name = f"{OWN}.outer.norm.subspace_peft_running_mean"
    assert name in load_file(tmp_path / WEIGHTS)
    other = wrap(case, "around", target_modules=["outer"], d=3)
    other.load_adapter(tmp_path, "default")
    other.set_adapter("default")
    for loaded in (load(tmp_path, case.model()), other):
        assert torch.equal(outputs(loaded.eval(), case), outputs(model, case))
    # a file with the name of the wrapper in its keys
    rewrite(tmp_path, lambda s: s.update({name.replace("outer.", "outer.base_layer."): s.pop(name)}))
    assert torch.equal(outputs(load(tmp_path, case.model()).eval(), case), outputs(model, case))
