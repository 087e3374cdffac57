"""Class features: compression and separation of known point clouds, and of the layers of a model."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from subspace_peft.spectra import ClassFeatures, class_features, first_tensor
from tests.cases import BY_NAME, close, normal, wrap


def features_of(features, labels, size=None, order=None):
    """ClassFeatures of these features, added in batches of `size`."""
    cloud = ClassFeatures()
    order = torch.arange(len(labels)) if order is None else order
    for part in order.split(size or len(order)):
        cloud.add(features[part], labels[part])
    return cloud


def test_a_cloud_of_known_spread():
    """Two classes at +-3 e_1, of points at +-1 along e_2: tr Sigma_W = 1, tr Sigma_B = 9, mu_1 = -mu_2."""
    features = torch.tensor([[3.0, 1], [3, -1], [-3, 1], [-3, -1]])
    cloud = features_of(features, torch.tensor([0, 0, 1, 1]))
    assert (cloud.within, cloud.between, cloud.compression) == (1, 9, 1 / 9)
    assert cloud.separation == pytest.approx(0, abs=1e-15)
    assert cloud.classes == [0, 1]
    assert cloud.counts.tolist() == [2, 2]
    assert cloud.means.tolist() == [[3, 0], [-3, 0]]


@pytest.mark.parametrize("K", [3, 4, 10])
def test_a_simplex_has_the_largest_separation(K):
    features = torch.eye(K, dtype=torch.float64).repeat(2, 1) + 5
    cloud = features_of(features, torch.arange(K).repeat(2))
    assert cloud.compression == pytest.approx(0, abs=1e-15)
    assert cloud.separation == pytest.approx(1 - 1 / (K - 1))


def test_orthogonal_means():
    """+-a, +-b on two orthogonal lines: opposite means have no separation, whatever the lengths of a and b."""
    features = torch.tensor([[1.0, 0], [-1, 0], [0, 7], [0, -7]])
    assert features_of(features, torch.arange(4)).separation == pytest.approx(0)
    mu = torch.tensor([[2.0, 0, 0], [0, 3, 0], [0, 0, 1], [-2, -3, -1]])
    expected = 1 - 3 / math.sqrt(14)
    assert features_of(mu, torch.arange(4)).separation == pytest.approx(expected)


def slides(features, labels):
    """D and S from the covariance matrices, as the slides define them."""
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
    cloud = features_of(features + shift, labels, batch, order)
    assert cloud.classes == labels.unique().tolist()
    assert cloud.counts.tolist() == sizes
    close(cloud.compression, D.item(), rtol=1e-6 if shift else 1e-11)
    close(cloud.separation, S.item(), atol=1e-6 if shift else 1e-11)


def test_features_far_from_zero_keep_their_digits():
    """The sum of squares minus the square of the sum would lose all of them."""
    spread = normal(2000, 4) * 1e-3
    features, labels = spread + 1e5, torch.arange(2000) % 2
    features[labels == 1] += 1
    close(features_of(features, labels, 64).within, features_of(spread, labels).within, rtol=1e-6)


def test_classes_of_one_mean():
    same = features_of(torch.ones(4, 3), torch.tensor([0, 0, 1, 1]))
    assert math.isnan(same.compression)
    assert math.isnan(same.separation)
    assert features_of(torch.tensor([[1.0], [-1], [1], [-1]]), torch.tensor([0, 0, 1, 1])).compression == math.inf


def test_bad_features():
    cloud = ClassFeatures()
    for features, labels in [
        (torch.ones(3, 2), torch.ones(4).long()),
        (torch.ones(3), torch.ones(3).long()),
        (torch.ones(3, 2), torch.ones(3)),
    ]:
        with pytest.raises(ValueError, match=r"Features must be \[B, ...\] and labels B integers.*pass `read`"):
            cloud.add(features, labels)
    with pytest.raises(ValueError, match="Features must be finite"):
        cloud.add(torch.full((2, 2), torch.inf), torch.tensor([0, 1]))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"must be of 2 classes or more, got \[\]|\[5\]"):
            _ = cloud.compression
        cloud.add(torch.ones(2, 3), torch.tensor([5, 5]))
    with pytest.raises(ValueError, match="must be of one size in all batches, got 4 after 3"):
        cloud.add(torch.ones(2, 4), torch.tensor([5, 5]))


# -------------------------------------------------------------------------------------------- of the layers of a model


class Pair(nn.Module):
    """Returns a tuple and works in place; one of its modules is in eval mode while the others train."""

    def __init__(self):
        super().__init__()
        self.fc, self.relu, self.drop = nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Dropout(0.5)

    def forward(self, x, scale=1.0):
        h = self.fc(x) * scale
        return self.drop(self.relu(h)), "something else"


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.pair, self.unused, self.head = Pair(), nn.Linear(1, 1), nn.Linear(5, 3)
        self.pair.drop.eval()

    def forward(self, x):
        return self.head(self.pair(x)[0])


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
    layers = class_features(model, batches, ["pair.fc", "pair", "head"])
    assert state_of(model) == before
    with torch.no_grad():
        fc = model.pair.fc(x)
        features = {"pair.fc": fc, "pair": fc.relu(), "head": model.head(fc.relu())}
    for name, values in features.items():
        D, S = slides(values.double(), y)
        close(layers[name].compression, D.item(), rtol=1e-6)
        close(layers[name].separation, S.item(), atol=1e-6)
    into = class_features(model, batches, ["head"], inputs=True)
    close(into["head"].compression, layers["pair"].compression)


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
    layers = class_features(
        model, [(x, torch.arange(len(x)))], ["bert.encoder", "classifier"],
        read=lambda output: output if isinstance(output, torch.Tensor) else output.last_hidden_state[:, 0],
    )  # fmt: skip
    assert layers["bert.encoder"].means.shape == (3, 8)
    assert layers["classifier"].compression == 0
    class_features(model, [(x, torch.arange(len(x)))], ["bert.encoder"])  # a ModelOutput: its first tensor


def test_bad_layers_leave_the_model_unchanged():
    model, _, _, batches = data()
    before = state_of(model)
    with pytest.raises(ValueError, match=r"`layers` must be modules of the model, 'fc' is none of .*pair.fc"):
        class_features(model, batches, ["fc"])
    with pytest.raises(ValueError, match="must run exactly once a batch .* 'unused' ran 0 times"):
        class_features(model, batches, ["unused", "head"])
    with pytest.raises(ValueError, match="must return a tensor first, got str; pass `read`"):
        class_features(model, batches, ["pair"], read=lambda output: first_tensor(output[1]))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        class_features(model, [(torch.ones(2, 5), torch.ones(2).long())], ["head"])
    repeated = nn.Sequential(model.head, nn.Linear(3, 5), model.head)
    with pytest.raises(ValueError, match="'0' ran 2 times"):
        class_features(repeated, [(torch.ones(2, 5), torch.ones(2).long())], ["0"])
    assert state_of(model) == before


def test_layers_of_an_adapted_model_by_their_plain_names():
    case = BY_NAME["mlp"]
    model, batches = wrap(case), [(torch.randn(8, 6), torch.arange(8) % 2)]
    plain = class_features(model, batches, ["fc1"])["fc1"]
    long = class_features(model, batches, ["base_model.model.fc1"])["base_model.model.fc1"]
    assert plain.compression == long.compression > 0
