"""Trajectory: what is recorded, that its bases are the singular vectors of the samples, and what is refused."""

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from subspace_peft import SubspaceConfig, Trajectory, TrajectoryCallback, coefficients, reconstruct
from subspace_peft.adapter_file import find_vectors
from tests.cases import BY_NAME, MLP, Allocations, Tied, wrap


SHAPES = {name: tuple(p.shape) for name, p in MLP().named_parameters()}
D = 114  # entries of MLP


def flat(tensors):
    """[D], or [D, d] of a basis."""
    d = next(iter(tensors.values())).shape[len(SHAPES[next(iter(tensors))]) :]
    return torch.cat([tensor.reshape(-1, *d) for tensor in tensors.values()])


def walk(t=9, scale=0.1, dtype=torch.float32, seed=0):
    """t samples of MLP's weights: a drift and noise of falling size, around weights of size 1."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(D, generator=generator, dtype=torch.float64)
    drift, samples = torch.randn(D, generator=generator, dtype=torch.float64), []
    for i in range(t):
        samples.append(w.to(dtype))
        w = w + scale * (drift + torch.randn(D, generator=generator, dtype=torch.float64)) / (i + 1)
    return torch.stack(samples, 1)  # [D, t]


def write(folder, W, steps=None, names=None):
    """The columns of W as samples, from a model that has them as weights."""
    trajectory = Trajectory(folder)
    model = MLP().to(W.dtype)
    for i, w in enumerate(W.T):
        nn.utils.vector_to_parameters(w, model.parameters())
        trajectory.add(model, steps[i] if steps else None)
    return trajectory


def assert_same_columns(P, Q, tolerance=1e-5):
    """Up to the signs."""
    products = (P.double().T @ Q.double()).abs()
    torch.testing.assert_close(products, torch.eye(P.shape[1], dtype=torch.float64), rtol=0, atol=tolerance)


def assert_orthonormal(P, tolerance=1e-5):
    gram = P.double().T @ P.double()
    torch.testing.assert_close(gram, torch.eye(P.shape[1], dtype=torch.float64), rtol=0, atol=tolerance)


def chosen(W, center, increments, initial=True):
    W = W.double()[:, 0 if initial else 1 :]
    W = W.diff(dim=1) if increments else W
    return W - W.mean(1, keepdim=True) if center else W


# ----------------------------------------------------------------------------------------------------------- a sample


def test_a_sample_is_what_trains(tmp_path):
    model = MLP()
    model.fc1.bias.requires_grad_(False)
    path = Trajectory(tmp_path / "new" / "folder").add(model)
    assert path == tmp_path / "new" / "folder" / "00000000.safetensors"
    state = load_file(path)
    assert set(state) == {"fc1.weight", "fc2.weight", "fc2.bias"}
    for name, tensor in state.items():
        assert torch.equal(tensor, model.get_parameter(name))


def test_tied_tensors_are_recorded_once(tmp_path):
    trajectory = Trajectory(tmp_path)
    trajectory.add(Tied())
    assert set(trajectory.sample(0)) == {"tokens.weight", "middle.weight", "middle.bias"}


def test_mixed_dtypes_lie_aligned(tmp_path):
    model = nn.Sequential(nn.Linear(3, 1).bfloat16(), nn.Linear(3, 5), nn.Linear(2, 2).double())
    path = Trajectory(tmp_path).add(model)
    for name, tensor in load_file(path).items():
        assert torch.equal(tensor, model.get_parameter(name))
        assert tensor.dtype == model.get_parameter(name).dtype


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
    (tmp_path / "00000009.safetensors.tmp").write_bytes(b"from a process that was killed")
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


def test_a_failed_write_leaves_nothing(tmp_path):
    trajectory, model = Trajectory(tmp_path), MLP()
    trajectory.add(model)
    model.fc2.bias = nn.Parameter(torch.zeros(4, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"must be of torch.float64.*`fc2.bias` is torch.complex64"):
        trajectory.add(model)
    assert os.listdir(tmp_path) == ["00000000.safetensors"]


# ------------------------------------------------------------------------------------------------------------ a basis


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("center", [True, False], ids=["centred", "raw"])
@pytest.mark.parametrize("increments", [False, True], ids=["points", "increments"])
def test_a_basis_is_the_left_singular_vectors(center, increments, dtype, tmp_path):
    W = walk(dtype=dtype)
    write(tmp_path, W)
    for initial in (True, False):
        trajectory = Trajectory(tmp_path, increments=increments, initial=initial)
        U, S, _ = torch.linalg.svd(chosen(W, center, increments, initial), full_matrices=False)
        basis = trajectory.basis(5, center=center)
        assert {name: tensor.shape for name, tensor in basis.items()} == {n: (*s, 5) for n, s in SHAPES.items()}
        assert_orthonormal(flat(basis))
        assert_same_columns(flat(basis), U[:, :5])
        torch.testing.assert_close(trajectory.singular_values(center)[:5], S[:5])


def test_ratios_are_those_of_pca(tmp_path):
    W = walk()
    trajectory = write(tmp_path, W)
    pca = PCA(svd_solver="full").fit(W.double().T.numpy())
    ratios = trajectory.explained_variance_ratio
    assert ratios.dtype == torch.float64
    torch.testing.assert_close(ratios, torch.from_numpy(pca.explained_variance_ratio_), rtol=1e-7, atol=1e-12)
    assert_same_columns(flat(trajectory.basis(4)), torch.from_numpy(pca.components_[:4].T.copy()))


@given(t=st.integers(2, 8), share=st.floats(0.05, 1), center=st.booleans(), increments=st.booleans())
def test_every_number_of_samples_and_columns(t, share, center, increments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trajectory")
    W = walk(t, seed=t)
    write(folder, W)
    most = t - increments - center
    trajectory = Trajectory(folder, increments=increments)
    if most < 1:
        with pytest.raises(ValueError, match="`d` must be at most 0"):
            trajectory.basis(1, center=center)
        return
    d = max(1, round(share * most))
    P = flat(trajectory.basis(d, center=center))
    assert_orthonormal(P)
    assert_same_columns(P, torch.linalg.svd(chosen(W, center, increments), full_matrices=False)[0][:, :d], 1e-4)


def test_columns_stay_orthonormal_where_the_spectrum_falls_far(tmp_path):
    """Singular values down to 1e-6 of the first: their squares are lost in a Gram matrix in float64."""
    U, _ = torch.linalg.qr(torch.randn(D, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    V, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
    W = U * 10 ** -torch.arange(0, 6.4, 0.8, dtype=torch.float64) @ V
    for center in (True, False):
        trajectory = write(tmp_path, W)
        P = flat(trajectory.basis(7, center=center, dtype=torch.float64))
        assert_orthonormal(P, 1e-10)
        assert_same_columns(P, torch.linalg.svd(chosen(W, center, False), full_matrices=False)[0][:, :7], 1e-3)


def test_signs_are_fixed(tmp_path):
    """The sample that weighs most in a column weighs positively, so a basis made twice is the same."""
    W = walk()
    trajectory = write(tmp_path, W)
    P = flat(trajectory.basis(6)).double()
    weights = (chosen(W, True, False).T @ P) / trajectory.singular_values()[:6]
    assert (weights.gather(0, weights.abs().argmax(0, keepdim=True)) > 0).all()
    assert torch.equal(flat(Trajectory(tmp_path).basis(6)).double(), P)


def test_only_the_named_tensors_count(tmp_path):
    W = walk()
    trajectory = write(tmp_path, W)
    basis = trajectory.basis(3, names=["fc2.bias", "fc1.weight"])
    assert list(basis) == ["fc2.bias", "fc1.weight"]
    part = torch.cat([W[110:], W[:60]])
    U = torch.linalg.svd(chosen(part, True, False), full_matrices=False)[0]
    assert_same_columns(flat(basis), U[:, :3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_budget_gives_the_same(dtype, tmp_path):
    W = walk(dtype=dtype)
    trajectory = write(tmp_path, W)
    expected = flat(trajectory.basis(5, dtype=torch.float64))
    for memory in (500, 1000, 5000):
        small = Trajectory(tmp_path, memory=memory)
        torch.testing.assert_close(flat(small.basis(5, dtype=torch.float64)), expected, rtol=0, atol=1e-12)
        small.save_basis(tmp_path / "basis.safetensors", 5, dtype=torch.float64)
        saved = load_file(tmp_path / "basis.safetensors")
        torch.testing.assert_close(flat({n: saved[n] for n in SHAPES}), expected, rtol=0, atol=1e-12)


def test_the_budget_holds(tmp_path):
    model, trajectory = nn.Linear(500, 100), Trajectory(tmp_path, memory=200_000)
    for _ in range(12):
        nn.init.normal_(model.weight)
        trajectory.add(model)
    with Allocations() as allocations:
        trajectory.save_basis(tmp_path / "basis.safetensors", 6)
    assert 50_000 < allocations.peak <= 200_000
    assert 12 * 50_100 * 4 > 10 * 200_000


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_saved_basis_is_the_basis(dtype, tmp_path):
    trajectory = write(tmp_path, walk())
    trajectory.save_basis(tmp_path / "basis.safetensors", 5, dtype=dtype)
    saved, made = load_file(tmp_path / "basis.safetensors"), trajectory.basis(5, dtype=dtype)
    assert set(saved) == set(made)
    for name, tensor in made.items():
        assert tensor.dtype == dtype
        assert torch.equal(saved[name], tensor)
    assert len(trajectory) == 9  # no sample


def test_a_new_sample_counts(tmp_path):
    W = walk()
    trajectory = write(tmp_path, W[:, :5])
    before = trajectory.singular_values()
    write(tmp_path, W[:, 5:])
    assert len(trajectory.singular_values()) == 9
    assert len(before) == 5


# ----------------------------------------------------------------------------------------- coordinates of a trajectory


def test_coefficients_and_reconstruction(tmp_path):
    W = walk(6)
    trajectory = write(tmp_path, W)
    full = trajectory.basis(5)
    origin = trajectory.sample(0)
    for i in range(6):
        w = trajectory.sample(i)
        c = coefficients(full, w, origin)
        torch.testing.assert_close(c, (flat(full).T.double() @ (W[:, i] - W[:, 0]).double()).float())
        again = reconstruct(full, c, origin)  # five directions hold six points
        for name in SHAPES:
            torch.testing.assert_close(again[name], w[name])
    two = trajectory.basis(2)
    part = reconstruct(two, coefficients(two, w, origin), origin)
    P = flat(two).double()
    torch.testing.assert_close(
        flat(part).double(), P @ P.T @ (W[:, -1] - W[:, 0]).double() + W[:, 0], atol=1e-6, rtol=0
    )


def test_coefficients_of_tensors_that_are_laid_out_otherwise():
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


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def recorded(tmp_path):
    return write(tmp_path, walk(4))


@pytest.mark.parametrize(
    ("d", "center", "message"),
    [
        (
            4,
            True,
            "`d` must be at most 3, the dimensions that the 4 samples in .* span around their mean, got 4; lower",
        ),
        (5, False, "`d` must be at most 4, the dimensions that the 4 samples in .* span, got 5"),
        (0, True, "`d` must be an integer of at least 1, got 0"),
        (2.0, True, "`d` must be an integer of at least 1, got 2.0"),
    ],
    ids=str,
)
def test_a_bad_d(recorded, d, center, message):
    with pytest.raises(ValueError, match=message):
        recorded.basis(d, center=center)


def test_identical_samples(tmp_path):
    W = walk(1).expand(D, 5)
    trajectory = write(tmp_path, W)
    with pytest.raises(ValueError, match="`d` must be at most 0, the dimensions that the 5 samples"):
        trajectory.basis(1)
    with pytest.raises(ValueError, match="Samples must differ to have a variance, all 5 are identical"):
        _ = trajectory.explained_variance_ratio
    write(tmp_path, walk(3)[:, 1:])
    with pytest.raises(ValueError, match="`d` must be at most 2"):
        trajectory.basis(3)
    assert_orthonormal(flat(trajectory.basis(2)))


def test_one_sample(tmp_path):
    write(tmp_path, walk(1))
    with pytest.raises(ValueError, match="`increments` are differences of two samples or more"):
        Trajectory(tmp_path, increments=True).basis(1)
    with pytest.raises(ValueError, match="all 1 are identical"):
        _ = Trajectory(tmp_path).explained_variance_ratio


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
def test_samples_of_another_model(recorded, other, message, tmp_path):
    model = MLP()
    other(model)
    with pytest.raises(ValueError, match=f"must be of one model: {message} is"):
        recorded.add(model)
    assert len(recorded) == 4
    save_file(
        {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, tmp_path / "00000009.safetensors"
    )
    with pytest.raises(ValueError, match=f"must be of one model: {message} is .*00000009.safetensors"):
        recorded.basis(2)


@pytest.mark.parametrize("keep", [0, 7, 8, 60, 400, -1, -100])
def test_a_half_written_sample(recorded, keep, tmp_path):
    path = tmp_path / "00000002.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:keep])
    for use in (lambda: recorded.basis(2), lambda: recorded.sample(2), lambda: recorded.explained_variance_ratio):
        with pytest.raises(ValueError, match=r"00000002.safetensors' of \d+ bytes is damaged or half-written; delete"):
            use()
    path.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match="damaged"):
        recorded.basis(2)


def test_nothing_is_unpickled(recorded, tmp_path):
    torch.save(MLP().state_dict(), tmp_path / "00000002.safetensors")
    with pytest.raises(ValueError, match="00000002.safetensors' .* is damaged"):
        recorded.basis(2)


def test_other_refusals(recorded, tmp_path):
    with pytest.raises(ValueError, match="must hold samples, '.*empty' holds none; record some with"):
        Trajectory(tmp_path / "empty").basis(1)
    with pytest.raises(ValueError, match=r"`fc9.weight` must be in the samples.*holds 4 other tensors, 'fc1.weight'"):
        recorded.basis(1, names=["fc9.weight"])
    with pytest.raises(ValueError, match="`names` must name one tensor or more, got none"):
        recorded.basis(1, names=[])
    with pytest.raises(ValueError, match="`memory` must be at least 160 bytes for 4 samples, got 100"):
        Trajectory(tmp_path, memory=100).basis(2)
    with pytest.raises(ValueError, match="`dtype` must be one of torch.float64.*got torch.int64"):
        recorded.basis(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="`step` must be an integer of at least 0, got -1"):
        recorded.add(MLP(), -1)
    with pytest.raises(ValueError, match="this model has none; set requires_grad, or record the base"):
        recorded.add(wrap(BY_NAME["mlp"]).requires_grad_(False))
    partitioned = MLP()
    partitioned.fc1.weight.ds_id = 0  # as DeepSpeed marks them
    with pytest.raises(ValueError, match="ZeRO-3 has left `fc1.weight` empty; take ZeRO-2 or FSDP"):
        recorded.add(partitioned)


# ---------------------------------------------------------------------------------------------------- with the Trainer


class Regression(nn.Module):
    """MLP in the Trainer's way, learning to be constant."""

    def __init__(self):
        super().__init__()
        self.net = MLP()

    def forward(self, x, labels=None):
        out = self.net(x)
        return {"loss": (out - 1).square().mean(), "logits": out}


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


def trainer(folder, samples, *callbacks, every="epoch", initial=True, **kwargs):
    torch.manual_seed(0)
    data = [{"x": torch.randn(6), "labels": torch.zeros(())} for _ in range(8)]
    arguments = TrainingArguments(
        output_dir=str(folder), num_train_epochs=4, per_device_train_batch_size=4, learning_rate=1e-2, save_steps=2,
        report_to=[], use_cpu=True, seed=0, **{"disable_tqdm": True, **kwargs},
    )  # fmt: skip
    recorder = TrajectoryCallback(samples, every=every, initial=initial)
    return Trainer(Regression(), arguments, train_dataset=data, callbacks=[recorder, *callbacks])


pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")


@pytest.mark.parametrize(
    ("every", "initial", "steps"),
    [("epoch", True, [0, 2, 4, 6, 8]), ("epoch", False, [2, 4, 6, 8]), (3, True, [0, 3, 6])],
    ids=str,
)
def test_the_callback(every, initial, steps, tmp_path):
    run = trainer(tmp_path / "run", tmp_path / "samples", every=every, initial=initial, save_strategy="no")
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.train()
    trajectory = Trajectory(tmp_path / "samples")
    assert trajectory.steps == steps
    if initial:
        assert all(torch.equal(before[name], tensor) for name, tensor in trajectory.sample(0).items())
    if steps[-1] == 8:
        last = trajectory.sample(-1)
        assert last.keys() == before.keys()
        assert all(torch.equal(p, last[name]) for name, p in run.model.named_parameters())
    assert_orthonormal(torch.cat([t.view(-1, 2) for t in trajectory.basis(2).values()]))


def test_one_progress_line(tmp_path, capsys):
    trainer(tmp_path, tmp_path / "quiet", save_strategy="no").train()
    assert "trajectory" not in capsys.readouterr().err
    trainer(tmp_path, tmp_path / "samples", save_strategy="no", disable_tqdm=False).train()
    assert "trajectory: 100%" in capsys.readouterr().err


def test_an_interrupted_recording_goes_on(tmp_path):
    trainer(tmp_path / "straight", tmp_path / "one", every=1).train()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "halves", tmp_path / "two", Interrupt(), every=1).train()
    one, two = Trajectory(tmp_path / "one"), Trajectory(tmp_path / "two")
    assert two.steps == [0, 1, 2, 3, 4, 5]
    two.add(Regression(), 7)  # later than the checkpoint of step 4: another course of the training
    again = trainer(tmp_path / "halves", tmp_path / "two", every=1)
    with pytest.raises(ValueError, match=r"must be recorded in a folder without samples, .* holds 7; resume that"):
        again.train()
    seen = []
    again.add_callback(type("Look", (TrainerCallback,), {"on_train_begin": lambda *a, **k: seen.append(two.steps)}))
    again.train(resume_from_checkpoint=True)
    assert seen == [[0, 1, 2, 3, 4]]
    assert two.steps == one.steps == list(range(9))
    for i in range(9):
        for name, tensor in one.sample(i).items():
            assert torch.equal(two.sample(i)[name], tensor), (i, name)


@pytest.mark.parametrize("every", [0, "step", 1.5, True])
def test_a_bad_interval(every, tmp_path):
    with pytest.raises(ValueError, match="`every` must be 'epoch' or a number of steps of at least 1, got"):
        TrajectoryCallback(tmp_path, every=every)


# --------------------------------------------------------------------------------------------------------- end to end


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
