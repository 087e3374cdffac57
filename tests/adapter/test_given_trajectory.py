"""A basis from the folder of a trajectory: the first principal components of the target tensors."""

import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from subspace_peft.adapter.walk import unique_coordinates
from tests.adapter.bases import CASE, refuse, stacked_P, walk
from tests.cases import move, outputs, settings, wrap


@pytest.mark.parametrize("targets", ["all", ["fc2"]], ids=str)
def test_a_trajectory_gives_the_components_of_the_targets(targets, tmp_path):
    trajectory = walk(tmp_path / "samples")
    model = wrap(
        CASE, projection="basis", basis=tmp_path / "samples", d=4, target_modules=targets, normalization="columns"
    )
    names = list(unique_coordinates(model, "default"))
    expected = trajectory.basis(4, names=names)
    torch.testing.assert_close(stacked_P(model), torch.cat([expected[name].reshape(-1, 4) for name in names]))
    move(model)
    model.save_pretrained(tmp_path / "adapter")
    shutil.rmtree(tmp_path / "samples")
    loaded = PeftModel.from_pretrained(CASE.model(), tmp_path / "adapter").eval()
    assert torch.equal(outputs(loaded, CASE), outputs(model, CASE))


def test_a_bad_trajectory(tmp_path):
    walk(tmp_path)
    basis = {"projection": "basis", "basis": str(tmp_path)}
    refuse("`d` is needed for the trajectory in .*: set it to 1 or more", **basis, d=None)
    refuse("`d` must be at most 5, the dimensions that the 6 samples", **basis, d=6)
    refuse("`save_projection=False` needs a basis in a file.*save_basis", **basis, d=2, save_projection=False)
    refuse("a safetensors file that exists", projection="coordinate", mask=tmp_path, d=None)
    refuse("`fc1.weight.B` must be in the samples", **basis, d=2, coordinates="low_rank", rank=2)
    other = CASE.model()
    other.fc2 = nn.Linear(10, 5)
    with pytest.raises(
        ValueError, match=r"`fc2.weight` must have the shape that the trajectory .*\[4, 10\], got \[5, 10\]"
    ):
        get_peft_model(other, settings(**basis, d=2))
    other.fc2 = CASE.model().fc2
    other.fc3 = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="`fc3.weight` must be in the samples .* holds 4 other tensors"):
        get_peft_model(other, settings(**basis, d=2))
