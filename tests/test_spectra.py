"""Spectra and class features: angles known in closed form, what is recorded of which model, and what is refused."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from subspace_peft import Spectra, SpectraCallback, SubspaceConfig
from subspace_peft.spectra import (
    ClassFeatures,
    blocks,
    class_features,
    first_tensor,
    matrices,
    principal_angles,
    vector_angles,
)
from tests.cases import BY_NAME, CASES, MLP, ConvNet, Tied, wrap


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def orthogonal(n, p=None, seed=0):
    return torch.linalg.qr(normal(n, p or n, seed=seed)).Q


def close(a, b, atol=1e-12, rtol=1e-9):
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    torch.testing.assert_close(a, b, atol=atol, rtol=rtol)


# ------------------------------------------------------------------------------------------------------------- angles


@pytest.mark.parametrize("angle", [0, 1e-12, 1e-9, 1e-5, 0.1, math.pi / 4, 1.0, math.pi / 2 - 1e-9, math.pi / 2])
def test_angles_of_known_rotations(angle):
    """Two planes of four dimensions that share nothing but what the angles say; arccos would give 0 below 1e-8."""
    Q, c, s = orthogonal(4), math.cos(angle), math.sin(angle)
    B = Q @ torch.tensor([[c, 0], [0, 1], [s, 0], [0, 0]], dtype=torch.float64)
    close(principal_angles(Q[:, :2], B), [0, angle], atol=1e-15)
    close(vector_angles(Q[:, :2], -B), [angle, 0], atol=1e-15)


@given(n=st.integers(1, 12), p=st.integers(0, 12), q=st.integers(0, 12), seed=st.integers(0, 9))
def test_angles_are_those_of_scipy(n, p, q, seed):
    A, B = orthogonal(n, min(p, n), seed=seed) if p else normal(n, 0), orthogonal(n, min(q, n), seed=seed + 10)
    B = B if q else normal(n, 0)
    found = principal_angles(A, B)
    assert len(found) == min(A.shape[1], B.shape[1])
    assert (found.diff() >= 0).all()
    if len(found):
        close(found, np.sort(scipy.linalg.subspace_angles(A.numpy(), B.numpy())), atol=1e-12)
        close(found, principal_angles(B, A), atol=1e-12)


def test_angles_do_not_depend_on_the_basis_of_a_subspace():
    A, B = orthogonal(9, 4), orthogonal(9, 4, seed=1)
    close(principal_angles(A, B), principal_angles(A @ orthogonal(4, seed=2), B @ orthogonal(4, seed=3)))
    close(principal_angles(A, A @ orthogonal(4, seed=2)), torch.zeros(4), atol=1e-14)


def test_bad_angles():
    A = orthogonal(5, 2)
    with pytest.raises(ValueError, match=r"`A` and `B` must be \[n, p\] and \[n, q\], got \[5, 2\] and \[4, 2\]"):
        principal_angles(A, A[:4])
    with pytest.raises(ValueError, match=r"columns of `B` must be orthonormal.*by 3; pass torch.linalg.qr\(B\).Q"):
        principal_angles(A, 2 * A)
    with pytest.raises(ValueError, match=r"both be \[n, q\], got \[5, 2\] and \[5, 1\]"):
        vector_angles(A, A[:, :1])


@pytest.mark.parametrize(
    ("q", "rank", "sizes"),
    [(10, 3, (3, 4, 3)), (6, 3, (3, 0, 3)), (5, 3, (3, 0, 2)), (3, 3, (3, 0, 0)), (2, 3, (2, 0, 0))],
)
def test_blocks(q, rank, sizes):
    assert tuple(len(range(q)[part]) for part in blocks(q, rank).values()) == sizes


# ----------------------------------------------------------------------------------------------------------- matrices


def test_matrices_of_plain_models():
    model = ConvNet()
    found = dict(matrices(model))
    assert {name: tuple(w.shape) for name, w in found.items()} == {
        "conv1.weight": (4, 27), "conv2.weight": (6, 18), "head.weight": (5, 6)
    }  # fmt: skip
    assert torch.equal(found["conv1.weight"], model.conv1.weight.reshape(4, 27))
    assert list(dict(matrices(model, r"conv\d.weight"))) == ["conv1.weight", "conv2.weight"]
    assert list(dict(matrices(nn.DataParallel(model), ["head.weight"]))) == ["head.weight"]
    assert list(dict(matrices(torch.compile(model, backend="eager"), ["head.weight"]))) == ["head.weight"]
    assert list(dict(matrices(Tied()))) == ["tokens.weight", "middle.weight"]
    inner = nn.Sequential(torch.compile(nn.Linear(2, 2), backend="eager"))
    assert list(dict(matrices(inner))) == ["0.weight"]


@pytest.mark.parametrize("names", ["fc1", ["fc1.weight", "fc9.weight"], [], "fc1.bias"])
def test_names_that_no_matrix_has(names):
    with pytest.raises(ValueError, match=r"`names` must name matrices of the model, .* it has 2: fc1.weight, fc2.wei"):
        list(matrices(MLP(), names))
    with pytest.raises(ValueError, match="must have weights that are matrices to have spectra, this one has none"):
        Spectra(rank=1).add(BY_NAME["norms"].model())


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
@pytest.mark.parametrize("case", [case for case in CASES if case.name != "norms"], ids=str)
@pytest.mark.parametrize("coordinates", ["weight", "low_rank"])
def test_matrices_of_adapted_models_are_those_of_the_merged_model(case, coordinates):
    changes = {} if coordinates == "weight" else {"coordinates": "low_rank", "rank": 2}
    try:
        model = wrap(case, **changes)
    except ValueError:
        pytest.skip("these targets have no low-rank coordinates")
    before = dict(matrices(case.model()))
    same = dict(matrices(model))
    assert same.keys() == before.keys()
    assert all(torch.equal(same[name], before[name].to(same[name].dtype)) for name in before)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "theta_d" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator()))
    moved = dict(matrices(model))
    with model.disable_adapter():
        assert all(torch.equal(w, before[name]) for name, w in matrices(model))
    model.merge_adapter()
    for name, w in matrices(model):
        torch.testing.assert_close(w, moved[name].to(w.dtype), atol=1e-6, rtol=1e-5)
    model.unmerge_adapter()
    plain = dict(matrices(model.merge_and_unload()))
    assert any(not torch.equal(plain[name], before[name]) for name in plain)
    for name in plain:
        torch.testing.assert_close(plain[name], moved[name].to(plain[name].dtype), atol=1e-6, rtol=1e-5)


def test_matrices_see_what_half_precision_rounds_away():
    config = SubspaceConfig(d=5, target_modules=["fc1"])
    model = get_peft_model(MLP().bfloat16(), config)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(1e-5)
    found = dict(matrices(model, ["fc1.weight"]))["fc1.weight"]
    base = model.base_model.model.fc1.base_layer.weight
    assert found.dtype == torch.float32
    assert 0 < (found - base.float()).abs().max() < 1e-3


def test_matrices_of_heads_and_of_lora():
    model = get_peft_model(MLP(), SubspaceConfig(d=5, target_modules=["fc1"], modules_to_save=["fc2"]))
    with torch.no_grad():
        model.base_model.model.fc2.modules_to_save.default.weight.add_(1)
    found = dict(matrices(model))
    assert list(found) == ["fc1.weight", "fc2.weight"]
    assert torch.equal(found["fc2.weight"], model.base_model.model.fc2.modules_to_save.default.weight)
    lora = get_peft_model(MLP(), LoraConfig(r=2, target_modules=["fc1"], init_lora_weights=False))
    found = dict(matrices(lora))
    assert list(found) == ["fc1.weight", "fc2.weight"]
    merged = dict(matrices(lora.merge_and_unload()))
    torch.testing.assert_close(found["fc1.weight"], merged["fc1.weight"])


# ------------------------------------------------------------------------------------------------------------ spectra


def turned(angle, n=8, m=6):
    """U diag V^T whose first left and last right singular vector turn into a new direction each."""
    U, V = orthogonal(n, n, seed=1), orthogonal(m, m, seed=2)
    c, s = math.cos(angle), math.sin(angle)
    U = torch.cat([c * U[:, :1] + s * U[:, -1:], U[:, 1:m]], 1)
    V[:, -2:] = V[:, -2:] @ torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    return U @ torch.diag(torch.tensor([9.0, 7, 5, 4, 2, 1], dtype=torch.float64) * (1 + angle)) @ V.T


@pytest.mark.parametrize("angle", [1e-13, 1e-6, 0.3])
def test_a_record_of_known_rotations(angle, tmp_path):
    spectra = Spectra(rank=1, folder=tmp_path)
    for t in range(3):
        spectra.add({"W": turned(t * angle), "b": torch.zeros(3)})
    assert spectra.steps == [0, 1, 2]
    assert spectra.weights == ["W"]
    sigma = torch.tensor([9.0, 7, 5, 4, 2, 1], dtype=torch.float64)
    close(spectra.singular_values("W"), torch.stack([sigma * (1 + t * angle) for t in range(3)]))
    turns, zero = angle * torch.arange(3.0).double()[:, None], torch.zeros(3, 1)
    close(spectra.angles("W", "left", "top"), turns, atol=1e-14)
    close(spectra.angles("W", "left", "middle"), zero.expand(3, 4), atol=1e-14)
    close(spectra.angles("W", "left", "bottom"), zero, atol=1e-14)
    close(spectra.angles("W", "right", "top"), zero, atol=1e-14)
    close(spectra.angles("W", "right", "bottom"), turns, atol=1e-14)
    close(spectra.angles("W", "right", "middle"), torch.cat([zero, zero, zero, turns], 1), atol=1e-14)
    close(spectra.vector_angles("W", "left"), torch.cat([turns, zero.expand(3, 5)], 1), atol=1e-14)
    close(spectra.vector_angles("W", "right"), torch.cat([zero.expand(3, 4), turns, turns], 1), atol=1e-14)
    again = Spectra(rank=1, folder=tmp_path)
    assert torch.equal(again.angles("W", "left", "top"), spectra.angles("W", "left", "top"))


def test_a_reference_of_ones_choice(tmp_path):
    spectra = Spectra(rank=1, reference=2, folder=tmp_path)
    for step in (0, 2, 5):
        spectra.add({"W": turned(0.1 * step)}, step)
    top = spectra.angles("W", "left", "top")[:, 0]
    assert top[0].isnan()
    close(top[1:], [0, 0.3], atol=1e-12)
    late = Spectra(rank=1, reference=3)
    late.add({"W": turned(0)}, 0)
    with pytest.raises(ValueError, match="must be recorded before later steps, got 4 and `reference` is 3"):
        late.add({"W": turned(0)}, 4)


def test_going_back(tmp_path):
    spectra = Spectra(rank=1, folder=tmp_path)
    for step in range(5):
        spectra.add({"W": turned(0.1 * step)}, step)
    spectra.add({"W": turned(0.7)}, 4)
    close(spectra.angles("W", "left", "top")[4], [0.7])
    with pytest.raises(ValueError, match=r"Steps must rise, got 2 after 4; call keep_until\(2\)"):
        spectra.add({"W": turned(0)}, 2)
    spectra.keep_until(2)
    again = Spectra(rank=1, folder=tmp_path)
    assert again.steps == spectra.steps == [0, 1, 2]
    again.add({"W": turned(0.5)})
    assert again.steps == [0, 1, 2, 3]
    close(again.angles("W", "left", "top")[3], [0.5])


def test_bad_records(tmp_path):
    spectra = Spectra(rank=2, folder=tmp_path)
    spectra.add(MLP())
    with pytest.raises(ValueError, match=r"must be of one model: `fc1.weight` gives \[7, 6\] here, \[10, 6\] before"):
        spectra.add({"fc1.weight": torch.randn(7, 6), "fc2.weight": torch.randn(4, 10)})
    with pytest.raises(ValueError, match=r"must be of one model: `fc2.weight` gives None here, \[4\] before"):
        spectra.add({"fc1.weight": torch.randn(10, 6)})
    with pytest.raises(ValueError, match="must be finite to have singular values, `W` is not at step 0"):
        Spectra(rank=1).add({"W": torch.full((2, 2), torch.nan)})
    with pytest.raises(ValueError, match="`rank` must be an integer of at least 1, got 0"):
        Spectra(rank=0)
    with pytest.raises(ValueError, match="`step` must be an integer of at least 0, got -1"):
        spectra.add(MLP(), -1)
    with pytest.raises(ValueError, match="'W' is none of"):
        spectra.singular_values("W")
    with pytest.raises(ValueError, match=r"must be of one `rank`, '.*00000000.safetensors' is of 2, got 3; take that"):
        Spectra(rank=3, folder=tmp_path)
    with pytest.raises(ValueError, match=r"must be of one `reference`, '.*00000000.safetensors' is of 0, got 1; take"):
        Spectra(rank=2, folder=tmp_path, reference=1)
    assert Spectra(rank=2, folder=tmp_path).steps == [0]
    path = tmp_path / "00000000.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"must be a whole safetensors file, '.*00000000.safetensors' is damaged"):
        Spectra(rank=2, folder=tmp_path)


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


def trainer(folder, spectra, *callbacks, adapted=False, every="epoch"):
    torch.manual_seed(0)
    data = [{"x": torch.randn(6), "labels": torch.zeros(())} for _ in range(8)]
    arguments = TrainingArguments(
        output_dir=str(folder), num_train_epochs=4, per_device_train_batch_size=4, learning_rate=1e-2, save_steps=2,
        report_to=[], use_cpu=True, seed=0, disable_tqdm=True,
    )  # fmt: skip
    model = Regression()
    if adapted:
        model = get_peft_model(model, SubspaceConfig(d=20, target_modules=["fc1"]))
    return Trainer(model, arguments, train_dataset=data, callbacks=[SpectraCallback(spectra, every), *callbacks])


pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_the_callback(adapted, tmp_path):
    spectra = Spectra(rank=2, names=r".*fc\d.weight", reference=3)
    run = trainer(tmp_path, spectra, adapted=adapted)
    run.train()
    assert spectra.steps == [0, 2, 3, 4, 6, 8]
    assert spectra.weights == ["net.fc1.weight", "net.fc2.weight"]
    plain = run.model.merge_and_unload() if adapted else run.model
    close(spectra.singular_values("net.fc1.weight")[-1], torch.linalg.svdvals(plain.net.fc1.weight), atol=1e-5)
    left = spectra.angles("net.fc1.weight", "left", "top")
    assert left[:2].isnan().all()
    assert (left[2] < 1e-12).all()
    assert (left[-1] > 1e-5).all()
    with pytest.raises(ValueError, match=r"recorded where nothing is, 6 steps are here \(folder: None\); resume"):
        run.train()


def test_an_interrupted_recording_goes_on(tmp_path):
    trainer(tmp_path / "straight", Spectra(rank=2, folder=tmp_path / "one"), every=1).train()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "halves", Spectra(rank=2, folder=tmp_path / "two"), Interrupt(), every=1).train()
    two = Spectra(rank=2, folder=tmp_path / "two")
    assert two.steps == [0, 1, 2, 3, 4, 5]  # the checkpoint is of step 4
    trainer(tmp_path / "halves", two, every=1).train(resume_from_checkpoint=True)
    one = Spectra(rank=2, folder=tmp_path / "one")
    assert two.steps == one.steps == list(range(9))
    for name in one.weights:
        assert torch.equal(one.singular_values(name), two.singular_values(name))
        assert torch.equal(one.vector_angles(name, "left"), two.vector_angles(name, "left"))
        assert torch.equal(one.angles(name, "right", "top"), two.angles(name, "right", "top"))


# ----------------------------------------------------------------------------------------------------- class features


def added(features, labels, size=None, order=None):
    found = ClassFeatures()
    order = torch.arange(len(labels)) if order is None else order
    for part in order.split(size or len(order)):
        found.add(features[part], labels[part])
    return found


def test_a_cloud_of_known_spread():
    """Two classes at +-3 e_1, of points at +-1 along e_2: tr Sigma_W = 1, tr Sigma_B = 9, mu_1 = -mu_2."""
    features = torch.tensor([[3.0, 1], [3, -1], [-3, 1], [-3, -1]])
    found = added(features, torch.tensor([0, 0, 1, 1]))
    assert (found.within, found.between, found.compression) == (1, 9, 1 / 9)
    assert found.separation == pytest.approx(0, abs=1e-15)
    assert found.classes == [0, 1]
    assert found.counts.tolist() == [2, 2]
    assert found.means.tolist() == [[3, 0], [-3, 0]]


@pytest.mark.parametrize("K", [3, 4, 10])
def test_a_simplex_is_as_separate_as_can_be(K):
    features = torch.eye(K, dtype=torch.float64).repeat(2, 1) + 5
    found = added(features, torch.arange(K).repeat(2))
    assert found.compression == pytest.approx(0, abs=1e-15)
    assert found.separation == pytest.approx(1 - 1 / (K - 1))


def test_orthogonal_means():
    """+-a, +-b orthogonal: two lines, so opposite means are not separate; with a and b scaled nothing changes."""
    features = torch.tensor([[1.0, 0], [-1, 0], [0, 7], [0, -7]])
    assert added(features, torch.arange(4)).separation == pytest.approx(0)
    mu = torch.tensor([[2.0, 0, 0], [0, 3, 0], [0, 0, 1], [-2, -3, -1]])
    expected = 1 - 3 / math.sqrt(14)
    assert added(mu, torch.arange(4)).separation == pytest.approx(expected)


def slides(features, labels):
    """D and S from the covariance matrices themselves."""
    classes = labels.unique()
    means = torch.stack([features[labels == k].mean(0) for k in classes])
    within = torch.stack([torch.cov(features[labels == k].T, correction=0) for k in classes]).mean(0)
    mu = means - means.mean(0)
    between = mu.T @ mu / len(classes)
    cosines = nn.functional.cosine_similarity(mu[:, None], mu[None], dim=-1) - torch.eye(len(classes))
    return within.trace() / between.trace(), 1 - cosines.abs().max()


@given(
    sizes=st.lists(st.integers(2, 9), min_size=2, max_size=5), batch=st.integers(1, 20), seed=st.integers(0, 99),
    shift=st.sampled_from([0.0, 1e6]),
)  # fmt: skip
def test_any_batches_in_any_order(sizes, batch, seed, shift):
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)) * 7 - 3
    features = normal(len(labels), 3, 2, seed=seed)
    D, S = slides(features.flatten(1), labels)
    order = torch.randperm(len(labels), generator=generator(seed))
    found = added(features + shift, labels, batch, order)
    assert found.classes == labels.unique().tolist()
    assert found.counts.tolist() == sizes
    close(found.compression, D.item(), rtol=1e-6 if shift else 1e-11)
    close(found.separation, S.item(), atol=1e-6 if shift else 1e-11)


def test_features_far_from_zero_keep_their_digits():
    """The sum of squares less the square of the sum would have none left."""
    spread = normal(2000, 4) * 1e-3
    features, labels = spread + 1e5, torch.arange(2000) % 2
    features[labels == 1] += 1
    close(added(features, labels, 64).within, added(spread, labels).within, rtol=1e-6)


def test_classes_of_one_mean():
    same = added(torch.ones(4, 3), torch.tensor([0, 0, 1, 1]))
    assert math.isnan(same.compression)
    assert math.isnan(same.separation)
    assert added(torch.tensor([[1.0], [-1], [1], [-1]]), torch.tensor([0, 0, 1, 1])).compression == math.inf


def test_bad_features():
    found = ClassFeatures()
    for features, labels in [
        (torch.ones(3, 2), torch.ones(4).long()),
        (torch.ones(3), torch.ones(3).long()),
        (torch.ones(3, 2), torch.ones(3)),
    ]:
        with pytest.raises(ValueError, match=r"Features must be \[B, ...\] and labels B integers.*give `read`"):
            found.add(features, labels)
    with pytest.raises(ValueError, match="Features must be finite"):
        found.add(torch.full((2, 2), torch.inf), torch.tensor([0, 1]))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"must be of 2 classes or more, got \[\]|\[5\]"):
            _ = found.compression
        found.add(torch.ones(2, 3), torch.tensor([5, 5]))
    with pytest.raises(ValueError, match="must be of one size in all batches, got 4 after 3"):
        found.add(torch.ones(2, 4), torch.tensor([5, 5]))


# ------------------------------------------------------------------------------------------------- of a model's layers


class Block(nn.Module):
    """Returns a tuple, works in place, and is never in eval mode as it came."""

    def __init__(self):
        super().__init__()
        self.fc, self.relu, self.drop = nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Dropout(0.5)

    def forward(self, x, scale=1.0):
        h = self.fc(x) * scale
        return self.drop(self.relu(h)), "something else"


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.unused, self.head = Block(), nn.Linear(1, 1), nn.Linear(5, 3)
        self.block.drop.eval()

    def forward(self, x):
        return self.head(self.block(x)[0])


def data(n=24, size=5):
    torch.manual_seed(0)
    model, x, y = Stack(), torch.randn(n, 6), torch.arange(n) % 3
    return model, x, y, list(zip(x.split(size), y.split(size), strict=True))


def state_of(model):
    return [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


def test_layers_of_a_model():
    model, x, y, batches = data()
    before = state_of(model)
    assert before[0][0]
    found = class_features(model, batches, ["block.fc", "block", "head"])
    assert state_of(model) == before
    with torch.no_grad():
        fc = model.block.fc(x)
        features = {"block.fc": fc, "block": fc.relu(), "head": model.head(fc.relu())}
    for name, values in features.items():
        D, S = slides(values.double(), y)
        close(found[name].compression, D.item(), rtol=1e-6)
        close(found[name].separation, S.item(), atol=1e-6)
    into = class_features(model, batches, ["head"], inputs=True)
    close(into["head"].compression, found["block"].compression)


def test_kinds_of_batches():
    model, x, y, batches = data()
    expected = class_features(model, batches, ["head"])["head"].means
    for kind in (
        [((a,), b) for a, b in batches],
        [({"x": a}, b) for a, b in batches],
        [{"x": a, "labels": b} for a, b in batches],
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=7),
    ):
        close(class_features(model, kind, ["head"])["head"].means, expected, atol=1e-6)
    with pytest.raises(ValueError, match="must be a pair .* got Tensor; wrap the loader"):
        class_features(model, [x], ["head"])


def test_a_transformer_with_read():
    case = BY_NAME["bert"]
    model, x = case.model(), case.batch()
    found = class_features(
        model, [(x, torch.arange(len(x)))], ["bert.encoder", "classifier"],
        read=lambda output: output if isinstance(output, torch.Tensor) else output.last_hidden_state[:, 0],
    )  # fmt: skip
    assert found["bert.encoder"].means.shape == (3, 8)
    assert found["classifier"].compression == 0
    class_features(model, [(x, torch.arange(len(x)))], ["bert.encoder"])  # a ModelOutput: its first tensor


def test_bad_layers_leave_the_model_as_it_was():
    model, _, _, batches = data()
    before = state_of(model)
    with pytest.raises(ValueError, match=r"`layers` must be modules of the model, 'fc' is none of .*block.fc"):
        class_features(model, batches, ["fc"])
    with pytest.raises(ValueError, match="must run once a batch .* 'unused' ran 0 times"):
        class_features(model, batches, ["unused", "head"])
    with pytest.raises(ValueError, match="must return a tensor first, got str; give `read`"):
        class_features(model, batches, ["block"], read=lambda output: first_tensor(output[1]))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        class_features(model, [(torch.ones(2, 5), torch.ones(2).long())], ["head"])
    shared = nn.Sequential(model.head, nn.Linear(3, 5), model.head)
    with pytest.raises(ValueError, match="'0' ran 2 times"):
        class_features(shared, [(torch.ones(2, 5), torch.ones(2).long())], ["0"])
    assert state_of(model) == before


def test_names_that_are_none():
    spectra = Spectra(rank=2)
    spectra.add({"W": torch.eye(4)})
    with pytest.raises(ValueError, match="`side` must be one of left, right, got 'up'"):
        spectra.angles("W", "up", "top")
    with pytest.raises(ValueError, match="`side` must be one of left, right, got 'up'"):
        spectra.vector_angles("W", "up")
    with pytest.raises(ValueError, match="`block` must be one of top, middle, bottom, got 'centre'"):
        spectra.angles("W", "left", "centre")
    with pytest.raises(ValueError, match="`spectra` must be a Spectra, got 'folder'"):
        SpectraCallback("folder")
    with pytest.raises(ValueError, match="set `initial=True`"):
        SpectraCallback(Spectra(rank=2, reference=0), initial=False)


def test_layers_of_an_adapted_model_by_their_plain_names():
    case = BY_NAME["mlp"]
    model, batches = wrap(case), [(torch.randn(8, 6), torch.arange(8) % 2)]
    plain = class_features(model, batches, ["fc1"])["fc1"]
    long = class_features(model, batches, ["base_model.model.fc1"])["base_model.model.fc1"]
    assert plain.compression == long.compression > 0
