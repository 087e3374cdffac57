"""Sensitivity, against a linear network, where it is a ratio of two norms."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from peft import get_peft_model
from torch import nn

from subspace_peft import SubspaceConfig
from subspace_peft.sensitivity import DIRECTIONS, LEAST_SPREAD, sensitivity
from tests.cases import BY_NAME, dense_P, settings, theta_d, wrap
from tests.models import MLP


X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


def linear(**changes):
    torch.manual_seed(0)
    return get_peft_model(nn.Sequential(nn.Linear(6, 4)), settings(d=5, target_modules=["0"], **changes))


def slope_of_linear(model, x):
    """The mean over directions of how far its outputs move, and how far they are from their mean."""
    base, P = model.base_model.model[0].base_layer, dense_P(model)
    outputs = x @ base.weight.T + base.bias
    generator, slopes = torch.Generator().manual_seed(0), []
    for _ in range(DIRECTIONS):
        z = torch.randn(5, generator=generator)
        slopes.append((x @ (P["0.weight"] @ z).view(4, 6).T + P["0.bias"] @ z).norm())
    return sum(slopes).item() / DIRECTIONS, (outputs - outputs.mean(0)).norm().item()


@pytest.mark.parametrize("changes", [{}, {"normalization": "columns"}, {"projection": "sparse"}], ids=str)
def test_of_a_linear_layer(changes):
    model = linear(**changes)
    slope, spread = slope_of_linear(model, 10 * X)
    assert spread > 32**0.5
    assert sensitivity(model, 10 * X).theta_d == pytest.approx(slope / spread, rel=1e-3)


def unit_directions(model, x):
    return nn.functional.normalize(model(x), dim=-1)


def rounded_directions(model, x):
    return unit_directions(model, x).bfloat16()


def shares(model, x):
    return model(x).softmax(-1)


def one_number(model, x):
    return model(x)[:, :1]


def test_logits_of_a_network_that_is_not_trained_have_a_least_spread():
    model = linear()
    slope, spread = slope_of_linear(model, X)
    least = LEAST_SPREAD * 32**0.5
    assert spread < least
    of_logits = sensitivity(model, X).theta_d
    assert of_logits == pytest.approx(slope / least, rel=1e-3)
    assert sensitivity(model, X, lambda model, x: {"logits": model(x)}).theta_d == of_logits
    masked = nn.functional.pad
    assert sensitivity(model, X, lambda model, x: masked(model(x), (0, 90), value=-torch.inf)).theta_d == of_logits
    features = sensitivity(model, X, lambda model, x: {"last_hidden_state": model(x)})
    assert features.theta_d == pytest.approx(slope / spread, rel=1e-3)


@pytest.mark.parametrize("outputs", [unit_directions, rounded_directions, shares, one_number])
def test_outputs_that_have_no_unit_of_logits(outputs):
    model = linear()
    assert sensitivity(model, X, outputs) == sensitivity(model, X, lambda model, x: {"outputs": outputs(model, x)})


def test_outputs_that_are_no_floats_are_refused():
    for outputs in (lambda model, x: model(x).argmax(-1), lambda model, x: {"logits": None}):
        with pytest.raises(ValueError, match="the model returned no tensor of floats"):
            sensitivity(linear(), X, outputs)


def test_an_adapter_that_no_run_reads_is_refused():
    model = linear()
    model.merge_adapter()
    with pytest.raises(ValueError, match="no run of the model reads it: its adapter is merged, disabled or"):
        sensitivity(model, X)
    assert model.base_model.subspace_vectors.substitute is None


def test_a_model_that_accelerate_has_offloaded():
    model, offloaded = linear(), cpu_offload(linear())
    assert sensitivity(offloaded, X) == sensitivity(model, X)


def test_logits_that_are_0_at_first():
    model = linear()
    with torch.no_grad():
        for parameter in model.base_model.model[0].base_layer.parameters():
            parameter.zero_()
    slope, spread = slope_of_linear(model, X)
    assert spread == 0
    assert sensitivity(model, X).theta_d == pytest.approx(slope / (LEAST_SPREAD * 32**0.5), rel=1e-3)


def test_the_steepest_up_to_a_change_of_three_counts():
    """A square grows with the change, and a bounded function never gets to a whole one."""
    model = linear()
    f_0 = model(X)
    plain = sensitivity(model, X, lambda model, x: {"outputs": 10 * f_0 + model(x) - f_0}).theta_d
    square = sensitivity(model, X, lambda model, x: {"outputs": 10 * f_0 + (model(x) - f_0) ** 2}).theta_d
    bounded = sensitivity(model, X, lambda model, x: {"outputs": 10 * f_0 + (model(x) - f_0).tanh()}).theta_d
    assert square == pytest.approx(square_at(3, model, 10 * spread_of(f_0)), rel=1e-3)
    assert 0.5 * plain < bounded <= plain


@pytest.mark.parametrize(("times", "change"), [(0.01, 1), (0.5, 1.5), (1, 3), (3, 3)])
def test_how_far_logits_go(times, change):
    """To three times what they vary by, and to a change of LEAST_SPREAD."""
    model, least = linear(), LEAST_SPREAD * 32**0.5
    f_0 = model(X) * times * least / spread_of(model(X))
    found = sensitivity(model, X, lambda model, x: f_0 + (model(x) - linear()(x)) ** 2).theta_d
    assert found == pytest.approx(square_at(change, model, max(times, 1) * least), rel=1e-3)


def spread_of(f):
    return (f - f.mean(0)).norm().item()


def square_at(change, model, size):
    """The change over sigma at that change, if outputs move by the squares of a linear layer's and vary by size."""
    P, generator, slopes = dense_P(model), torch.Generator().manual_seed(0), []
    for _ in range(DIRECTIONS):
        z = torch.randn(5, generator=generator)
        of_square = (X @ (P["0.weight"] @ z).view(4, 6).T + P["0.bias"] @ z).square().norm() / size
        slopes.append((change * of_square).sqrt())
    return sum(slopes).item() / DIRECTIONS


def test_a_deep_network_that_is_not_trained():
    """Its outputs grow with a power of theta_d, so a line through 0 does not find where they have moved by a tenth."""
    torch.manual_seed(0)
    layers = [each for _ in range(12) for each in (nn.Linear(16, 16, bias=False), nn.GELU())]
    model = get_peft_model(nn.Sequential(nn.Linear(6, 16), *layers), settings(d=50, target_modules="all"))
    assert 0.01 < 1 / sensitivity(model, X).theta_d < 10


@pytest.mark.parametrize("case", ["bert", "convnet", "llama"])
def test_the_model_is_left_as_it_was(case):
    case = BY_NAME[case]
    model = wrap(case).train()
    with torch.no_grad():
        theta_d(model).normal_(std=1e-3)
    model.base_model.model.get_submodule(next(n for n, _ in model.base_model.model.named_children())).eval()
    modes = [module.training for module in model.modules()]
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    batch = case.batch()
    state = torch.get_rng_state()
    assert sensitivity(model, batch).theta_d > 0
    assert torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(random)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert theta_d(model).grad is None


def test_a_new_head_that_is_zero():
    model = get_peft_model(MLP(), settings(target_modules=["fc1"], modules_to_save=["fc2"]))
    hidden = model.base_model.model.fc1.base_layer(X).tanh()
    before = sensitivity(model, X)
    assert before.head == pytest.approx(hidden.abs().sum(1).mean().item(), rel=1e-4)
    with torch.no_grad():
        for parameter in model.base_model.model.fc2.modules_to_save["default"].parameters():
            parameter.zero_()
    after = sensitivity(model, X)
    assert 0 < after.theta_d <= before.theta_d
    assert after.head == before.head
    assert sensitivity(linear(), X).head is None


@pytest.mark.parametrize(("bias", "larger"), [(10.0, 0), (-1.5, 1)], ids=["hardly varies", "mostly zero"])
def test_what_enters_a_head(bias, larger):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 3))
    nn.init.constant_(net[0].bias, bias)
    x = net[:2](X).detach()
    lengths = [each.abs().sum(1).mean().item() for each in (x, x - x.mean(0))]
    assert lengths.index(max(lengths)) == larger
    model = get_peft_model(net, settings(target_modules=["0"], modules_to_save=["2"]))
    assert sensitivity(model, X).head == pytest.approx(lengths[larger], rel=1e-4)


def test_large_outputs_are_compared_by_some_of_their_rows(monkeypatch):
    model, x = linear(), torch.randn(1000, 6, generator=torch.Generator().manual_seed(0))
    whole = sensitivity(model, x)
    monkeypatch.setattr("subspace_peft.evaluation.ENTRIES", 1000)
    assert sensitivity(model, x).theta_d == pytest.approx(whole.theta_d, rel=0.1)


class Pixels(nn.Module):
    """Images to a map of classes, by a new head that is a convolution, or a Linear for each pixel."""

    def __init__(self, convolution):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.convolution = nn.Conv2d(3, 8, 1), convolution
        self.head = nn.Conv2d(8, 4, 1) if convolution else nn.Linear(8, 4)

    def forward(self, x):
        x = self.body(x).tanh()
        return self.head(x) if self.convolution else self.head(x.movedim(1, -1))


def test_a_head_that_is_a_convolution():
    x = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    one, other = (
        sensitivity(get_peft_model(Pixels(kind), settings(target_modules=["body"], modules_to_save=["head"])), x).head
        for kind in (True, False)
    )
    assert one == pytest.approx(other, rel=1e-5)


class Noisy(nn.Module):
    """Draws random numbers in evaluation mode too, and excludes a class."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 4)

    def forward(self, x):
        y = self.inner(x) + torch.randn(len(x), 4)
        return torch.cat([y, torch.full((len(x), 1), -torch.inf)], 1)


def test_random_numbers_are_the_same_in_each_evaluation_and_infinite_logits_are_passed_over():
    torch.manual_seed(0)
    model = get_peft_model(Noisy(), settings(target_modules=["inner"]))
    state = torch.get_rng_state()
    found = sensitivity(model, X)
    assert torch.equal(torch.get_rng_state(), state)
    assert sensitivity(model, X) == found
    sigma = 1e-2  # far below the noise
    z = torch.randn(theta_d(model).shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(X)[:, :4]
        theta_d(model).copy_(sigma * z)
        torch.set_rng_state(state)
        after = model(X)[:, :4]
    slope = (after - before).norm() / (before - before.mean(0)).norm() / sigma
    assert found.theta_d == pytest.approx(slope.item(), rel=0.7)  # the other direction has another one


def test_a_list_reaches_the_model_as_a_list():
    class Takes(nn.Linear):
        def forward(self, xs):
            assert isinstance(xs, list)
            return super().forward(xs[0])

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Takes(6, 4)

        def forward(self, xs):
            return self.inner(xs)

    assert sensitivity(get_peft_model(Model(), settings(target_modules=["inner"])), {"xs": [X]}).theta_d > 0


def test_samples_that_are_equal_up_to_rounding():
    model = get_peft_model(MLP(), settings(target_modules=["fc1", "fc2"]))
    with pytest.raises(ValueError, match="all of this one are the same"):
        sensitivity(model, X[:1].expand(7, -1) * (1 + 1e-7 * torch.arange(7.0)[:, None]))


def test_what_has_none():
    with pytest.raises(ValueError, match="the model returned no tensor of floats; give more samples, or a learning"):
        sensitivity(linear(), X, lambda model, x: {"loss": model(x).sum()})
    with pytest.raises(ValueError, match="must have a trainable theta_d, it has none"):
        sensitivity(nn.Linear(6, 4), X)
    for outputs in (lambda model, x: model(x[:1]), lambda model, x: model(x) * torch.nan):
        with pytest.raises(ValueError, match="samples with different outputs"):
            sensitivity(linear(), X, outputs)
    network = nn.ModuleDict({"used": nn.Linear(6, 4), "unused": nn.Linear(6, 4)})
    network.forward = lambda x: network["used"](x)
    model = get_peft_model(network, SubspaceConfig(d=5, target_modules=["unused"]))
    with pytest.raises(ValueError, match="must depend on theta_d smoothly"):
        sensitivity(linear(), X, lambda model, x: {"outputs": 0 * model(x) + x[:, :4]})
    with pytest.raises(ValueError, match="must depend on theta_d .* or none of its targets runs"):
        sensitivity(model, X)
    assert not theta_d(model).any()


def test_what_comes_after_a_loss_in_a_tuple_is_logits():
    expected = sensitivity(linear(), X)
    assert sensitivity(linear(), X, lambda model, x: (model(x).mean(), model(x))) == pytest.approx(expected)
