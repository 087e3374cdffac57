"""Trajectory: what it records, coefficients in its basis, and what it refuses."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import nn

from subspace_peft import SubspaceConfig, Trajectory, coefficients, reconstruct
from subspace_peft.adapter.walk import find_vectors
from tests.cases import BY_NAME, base_outputs, outputs, train, wrap
from tests.models import MLP, Tied
from tests.trajectory.walks import SHAPES, flat, walk, write


def test_a_sample_holds_what_trains(tmp_path):
    model = MLP()
    model.fc1.bias.requires_grad_(False)
    path = Trajectory(tmp_path / "new" / "folder").add(model)
    assert path == tmp_path / "new" / "folder" / "00000000.safetensors"
    sample = load_file(path)
    assert set(sample) == {"fc1.weight", "fc2.weight", "fc2.bias"}
    for name, tensor in sample.items():
        assert torch.equal(tensor, model.get_parameter(name))


def test_tied_tensors_are_recorded_once(tmp_path):
    trajectory = Trajectory(tmp_path)
    trajectory.add(Tied())
    assert set(trajectory.sample(0)) == {"tokens.weight", "middle.weight", "middle.bias"}


def trained_convnets(folder, steps=3):
    """A trajectory of a net with batch norm, and its outputs in evaluation mode at each sample."""
    case = BY_NAME["convnet"]
    model, trajectory, expected = case.model().requires_grad_(True), Trajectory(folder), []
    for _ in range(steps):
        train(model, case, lr=0.1)
        trajectory.add(model)
        expected.append(outputs(model, case))
    return trajectory, expected


def test_a_fresh_net_with_a_sample_gives_the_outputs_of_that_step(tmp_path):
    trajectory, expected = trained_convnets(tmp_path)
    case = BY_NAME["convnet"]
    for i, then in enumerate(expected):
        fresh = case.model()
        fresh.load_state_dict(trajectory.sample(i))
        assert torch.equal(outputs(fresh, case), then)
    assert trajectory.sample(0)["bn1.num_batches_tracked"] == 2


def test_a_sample_of_an_adapter_holds_its_statistics_and_leaves_the_bases_alone(tmp_path):
    case, trajectory = BY_NAME["convnet"], Trajectory(tmp_path)
    model = wrap(case)
    train(model, case, lr=0.1)
    trajectory.add(model)
    fresh = wrap(case)
    fresh.load_state_dict(trajectory.sample(0), strict=False)
    assert torch.equal(outputs(fresh, case), outputs(model, case))
    with fresh.disable_adapter():
        assert torch.equal(outputs(fresh, case), base_outputs(case))


def test_statistics_enter_no_basis(tmp_path):
    trajectory, _ = trained_convnets(tmp_path)
    parameters = {name: tuple(p.shape) for name, p in BY_NAME["convnet"].model().named_parameters()}
    assert trajectory.shapes == parameters
    basis = trajectory.basis(2)
    assert set(basis) == set(parameters)
    W = torch.stack([torch.cat([trajectory.sample(i)[n].flatten() for n in parameters]) for i in range(3)], 1).double()
    W = W - W.mean(1, keepdim=True)
    variances = torch.linalg.svdvals(W).square()[:3]
    torch.testing.assert_close(trajectory.explained_variance_ratio, variances / variances.sum(), rtol=1e-6, atol=1e-9)


def test_samples_without_statistics_load(tmp_path):
    """Version 0.1 recorded parameters alone; such a trajectory can be continued."""
    trajectory, _ = trained_convnets(tmp_path)
    first = trajectory.files()[0]
    save_file({name: tensor for name, tensor in load_file(first).items() if name in trajectory.shapes}, first)
    trajectory.add(BY_NAME["convnet"].model().requires_grad_(True))
    assert len(trajectory) == 4
    assert set(trajectory.basis(3)) == set(trajectory.sample(0)) < set(trajectory.sample(-1))


def test_every_buffer_of_the_state_dict_is_recorded(tmp_path):
    model = MLP()
    model.register_buffer("mask", torch.tensor([True, False]))
    model.register_buffer("phases", torch.tensor([1j, 2]))
    model.register_buffer("scratch", torch.zeros(2), persistent=False)
    trajectory = Trajectory(tmp_path)
    trajectory.add(model)
    assert set(trajectory.sample(0)) == set(model.state_dict())
    for name in ("mask", "phases"):
        assert torch.equal(trajectory.sample(0)[name], model.get_buffer(name))
    assert trajectory.shapes == SHAPES


def compiled(module):
    return torch.compile(module, backend="eager")


@pytest.mark.parametrize("wrapper", [nn.DataParallel, compiled, lambda module: nn.DataParallel(compiled(module))])
def test_names_are_those_of_the_plain_model(wrapper, tmp_path):
    trajectory = Trajectory(tmp_path)
    trajectory.add(wrapper(MLP()))
    assert trajectory.shapes == SHAPES
    inner = nn.Sequential(compiled(nn.Linear(2, 2)))
    trajectory = Trajectory(tmp_path / "inner")
    trajectory.add(inner)
    assert set(trajectory.shapes) == {"0.weight", "0.bias"}


def test_steps(tmp_path):
    trajectory, model = Trajectory(tmp_path), MLP()
    for step in (None, 7, None, 3, 123456789):
        trajectory.add(model, step)
    (tmp_path / "00000009.safetensors.tmp").write_bytes(b"of a process that was killed")
    assert trajectory.steps == [0, 3, 7, 8, 123456789]
    assert len(trajectory) == 5
    assert Trajectory(tmp_path, initial=False).steps == [3, 7, 8, 123456789]
    assert Trajectory(tmp_path, last=7).steps == [0, 3, 7]
    with torch.no_grad():
        model.fc1.bias.add_(1)
    trajectory.add(model, 3)
    assert len(trajectory) == 5
    assert torch.equal(trajectory.sample(1)["fc1.bias"], model.fc1.bias)
    assert not torch.equal(trajectory.sample(-1)["fc1.bias"], model.fc1.bias)


def test_coefficients_and_reconstruction(tmp_path):
    W = walk(6)
    trajectory = write(tmp_path, W)
    full = trajectory.basis(5)
    origin = trajectory.sample(0)
    for i in range(6):
        w = trajectory.sample(i)
        c = coefficients(full, w, origin)
        torch.testing.assert_close(c, (flat(full).T.double() @ (W[:, i] - W[:, 0]).double()).float())
        weights = reconstruct(full, c, origin)  # six points span five directions
        for name in SHAPES:
            torch.testing.assert_close(weights[name], w[name])
    two = trajectory.basis(2)
    projected = reconstruct(two, coefficients(two, w, origin), origin)
    P = flat(two).double()
    torch.testing.assert_close(
        flat(projected).double(), P @ P.T @ (W[:, -1] - W[:, 0]).double() + W[:, 0], atol=1e-6, rtol=0
    )


def test_coefficients_in_another_memory_format():
    generator = torch.Generator().manual_seed(0)
    basis = {"a": torch.randn(2, 3, 4, 4, 5, generator=generator)}
    w, origin = ({"a": torch.randn(2, 3, 4, 4, generator=generator)} for _ in range(2))
    expected = coefficients(basis, w, origin)
    w["a"], origin["a"] = (t["a"].to(memory_format=torch.channels_last) for t in (w, origin))
    assert torch.equal(coefficients(basis, w, origin), expected)


def test_coefficients_of_other_tensors():
    basis, zero = {"a": torch.eye(4)[:, :2]}, {"a": torch.zeros(4), "b": torch.zeros(3)}
    assert torch.equal(coefficients(basis, {"a": torch.arange(4.0)}, zero), torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match=r"`a` must be of shape \[4\] as in the basis, got none"):
        coefficients(basis, {"c": torch.zeros(4)}, zero)
    with pytest.raises(ValueError, match=r"`a` must be of shape \[4\] as in the basis, got \[5\]"):
        reconstruct(basis, torch.zeros(2), {"a": torch.zeros(5)})


def test_other_refusals(tmp_path):
    trajectory = write(tmp_path, walk(4))
    with pytest.raises(ValueError, match="must hold samples, '.*empty' holds none; record some with"):
        Trajectory(tmp_path / "empty").basis(1)
    with pytest.raises(
        ValueError, match=r"`fc9.weight` must be in the samples.*holds 4 other tensors, such as 'fc1.weight'"
    ):
        trajectory.basis(1, names=["fc9.weight"])
    with pytest.raises(ValueError, match="`names` must name one tensor or more, got none"):
        trajectory.basis(1, names=[])
    with pytest.raises(ValueError, match="`memory` must be at least 160 bytes for 4 samples, got 100"):
        Trajectory(tmp_path, memory=100).basis(2)
    with pytest.raises(ValueError, match="`dtype` must be one of torch.float64.*got torch.int64"):
        trajectory.basis(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="`step` must be an integer of at least 0, got -1"):
        trajectory.add(MLP(), -1)
    with pytest.raises(ValueError, match="this model has none; set requires_grad, or record the base"):
        trajectory.add(wrap(BY_NAME["mlp"]).requires_grad_(False))
    partitioned = MLP()
    partitioned.fc1.weight.ds_id = 0  # as DeepSpeed marks its parameters
    with pytest.raises(
        ValueError, match="sharded by DeepSpeed's ZeRO-3 to be recorded, `fc1.weight` is; use ZeRO-2 or FSDP"
    ):
        trajectory.add(partitioned)


def test_training_in_the_subspace_of_a_trajectory(tmp_path):
    """DLDR on digits: sample SGD, train in ten dimensions from the initial weights, save, load."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)

    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def steps(model, lr, count):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=0.9)
        for step in range(count):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            yield step

    def accuracy(model):
        with torch.no_grad():
            return (model(x).argmax(1) == y).float().mean().item()

    model, trajectory = network(), Trajectory(tmp_path / "samples")
    trajectory.add(model)
    for step in steps(model, 0.2, 30):
        if step % 2:
            trajectory.add(model)
    sampled, start = accuracy(model), accuracy(network())
    config = SubspaceConfig(
        projection="basis", basis=tmp_path / "samples", d=10, target_modules="all", normalization="columns"
    )
    adapted = get_peft_model(network(), config)
    assert accuracy(adapted) == start
    for _ in steps(adapted, 0.5, 60):
        pass
    assert find_vectors(adapted).subspace_peft_theta_d["default"].shape == (10,)
    assert accuracy(adapted) > max(0.9, sampled - 0.02) > start + 0.5
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(network(), tmp_path / "adapter")
    assert torch.equal(loaded(x), adapted(x))
