"""A basis in a file that several adapters share, and of which their files hold the digest alone."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from subspace_peft import SubspaceConfig, Trajectory
from tests.adapter.bases import CASE, walk
from tests.cases import outputs, refused, train, wrap


@pytest.fixture
def shared(tmp_path):
    """An adapter that leaves its columns in a file, of more columns than it uses."""
    walk(tmp_path / "samples").save_basis(tmp_path / "shared.safetensors", 5)
    config = {"projection": "basis", "basis": tmp_path / "shared.safetensors", "d": 3, "save_projection": False}
    model = wrap(CASE, **config)
    train(model, CASE)
    model.save_pretrained(tmp_path / "adapter")
    return model


def test_a_shared_basis_is_stored_once(shared, tmp_path):
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in state.values()) == 3 + 8  # theta_d and the mark
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["basis"] == str(tmp_path / "shared.safetensors")
    assert len(config["basis_digest"]) == 32
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(
            CASE.model(), tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage
        ).eval()
        assert torch.equal(outputs(loaded, CASE), outputs(shared, CASE))
    loaded.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(CASE.model(), tmp_path / "again").eval()
    assert torch.equal(outputs(again, CASE), outputs(shared, CASE))
    assert len(load_file(tmp_path / "again" / "adapter_model.safetensors")) == 2


def test_a_shared_basis_that_has_moved(shared, tmp_path):
    (tmp_path / "shared.safetensors").rename(tmp_path / "moved.safetensors")
    with pytest.raises(ValueError, match="shared.safetensors'.* If the file has moved: config = SubspaceConfig.from_"):
        PeftModel.from_pretrained(CASE.model(), tmp_path / "adapter")
    config = SubspaceConfig.from_pretrained(tmp_path / "adapter")
    config.basis = str(tmp_path / "moved.safetensors")
    loaded = PeftModel.from_pretrained(CASE.model(), tmp_path / "adapter", config=config).eval()
    assert torch.equal(outputs(loaded, CASE), outputs(shared, CASE))


def test_a_shared_basis_that_has_changed(shared, tmp_path):
    Trajectory(tmp_path / "samples", increments=True).save_basis(tmp_path / "shared.safetensors", 4)
    base = CASE.model()
    with refused(base, "the one that the adapter was trained in: the first 3 columns of .*shared.safe"):
        PeftModel.from_pretrained(base, tmp_path / "adapter")
