"""Class features: compression and separation of known clouds, and of the layers of a model."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from subspace_peft.spectra import ClassFeatures, class_features, first_tensor
from tests.cases import BY_NAME, close, normal, wrap


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
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
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


# -------------------------------------------------------------------------------------------- of the layers of a model


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


def test_layers_of_an_adapted_model_by_their_plain_names():
    case = BY_NAME["mlp"]
    model, batches = wrap(case), [(torch.randn(8, 6), torch.arange(8) % 2)]
    plain = class_features(model, batches, ["fc1"])["fc1"]
    long = class_features(model, batches, ["base_model.model.fc1"])["base_model.model.fc1"]
    assert plain.compression == long.compression > 0
