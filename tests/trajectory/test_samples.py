"""The files of samples: their content, and which files are refused."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from subspace_peft import Trajectory
from tests.models import MLP
from tests.trajectory.walks import walk, write


def test_mixed_dtypes_are_aligned(tmp_path):
    model = nn.Sequential(nn.Linear(3, 1).bfloat16(), nn.Linear(3, 5), nn.Linear(2, 2).double())
    path = Trajectory(tmp_path).add(model)
    for name, tensor in load_file(path).items():
        assert torch.equal(tensor, model.get_parameter(name))
        assert tensor.dtype == model.get_parameter(name).dtype


def test_a_failed_write_leaves_nothing(tmp_path):
    trajectory, model = Trajectory(tmp_path), MLP()
    trajectory.add(model)
    model.fc2.bias = nn.Parameter(torch.zeros(4, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"must be of torch.float64.*`fc2.bias` is torch.complex64"):
        trajectory.add(model)
    assert os.listdir(tmp_path) == ["00000000.safetensors"]


@pytest.mark.parametrize("where", [0, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_samples_that_are_not_finite(where, value, tmp_path):
    W = walk(4)
    W[105, where] = value  # in fc2.weight
    with pytest.raises(ValueError, match=f"finite, `fc2.weight` of .*0000000{where}.safetensors' is not"):
        write(tmp_path, W).basis(2)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda m: setattr(m, "fc2", nn.Linear(10, 5)), "`fc2.weight`"),
        (lambda m: setattr(m, "fc3", nn.Linear(1, 1, bias=False)), "`fc3.weight`"),
        (lambda m: m.fc1.bias.requires_grad_(False), "`fc1.bias`"),
    ],
    ids=["shape", "more", "fewer"],
)
def test_samples_of_another_model(other, message, tmp_path):
    trajectory = write(tmp_path, walk(4))
    model = MLP()
    other(model)
    with pytest.raises(ValueError, match=f"must be of one model: {message} is"):
        trajectory.add(model)
    assert len(trajectory) == 4
    save_file(
        {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, tmp_path / "00000009.safetensors"
    )
    with pytest.raises(ValueError, match=f"must be of one model: {message} is .*00000009.safetensors"):
        trajectory.basis(2)


@pytest.mark.parametrize("keep", [0, 7, 8, 60, 400, -1, -100])
def test_a_half_written_sample(keep, tmp_path):
    trajectory = write(tmp_path, walk(4))
    path = tmp_path / "00000002.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:keep])
    for use in (
        lambda: trajectory.basis(2),
        lambda: trajectory.sample(2),
        lambda: trajectory.explained_variance_ratio,
    ):
        with pytest.raises(ValueError, match=r"00000002.safetensors' of \d+ bytes is damaged or half-written; delete"):
            use()
    path.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match="damaged"):
        trajectory.basis(2)


def test_nothing_is_unpickled(tmp_path):
    trajectory = write(tmp_path, walk(4))
    torch.save(MLP().state_dict(), tmp_path / "00000002.safetensors")
    with pytest.raises(ValueError, match="00000002.safetensors' .* is damaged"):
        trajectory.basis(2)
