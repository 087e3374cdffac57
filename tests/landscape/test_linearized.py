"""Linearised networks against finite differences, and as models to adapt."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from subspace_peft import SubspaceConfig
from subspace_peft.landscape import hessian_product, linearized
from tests.cases import BY_NAME, dense_P, move, theta_d


NAMES = ["mlp", "convnet", "norms", "bare", "tied", "shared_modules"]
CONFIG = {"d": 7, "target_modules": "all", "projection": "fastjl", "normalization": "columns"}


class Network(nn.Module):
    """Smooth, with submodules in submodules, batch norm, dropout, a frozen parameter and a tied one."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 6))
        self.body[4].weight = self.body[0].weight
        self.body.scale = nn.Parameter(torch.tensor(2.0), requires_grad=False)
        self.head = nn.Linear(6, 4, bias=False)

    def forward(self, x):
        return self.head(torch.tanh(self.body.scale * self.body(x)))


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = Network().double()
    model.body[1].running_mean.normal_()
    return model


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 3, 0])


def test_at_the_point_it_is_the_network():
    model = network(0)
    tangent = linearized(model)
    assert torch.equal(tangent(X), model.eval()(X))
    assert {n: p.requires_grad for n, p in tangent.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    assert torch.equal(tangent.train()(X), tangent(X))  # no dropout, no batch statistics


def test_its_weights_start_at_the_model_and_its_point_stays():
    model, optimum = network(0), network(1)
    tangent = linearized(model, at=optimum.state_dict())
    for name, parameter in tangent.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))
        assert parameter is not model.get_parameter(name)
    with torch.no_grad():
        for name, parameter in tangent.named_parameters():
            parameter.copy_(optimum.get_parameter(name))
    torch.testing.assert_close(tangent(X), optimum.eval()(X), rtol=1e-12, atol=1e-12)
    model.head.weight.data.zero_()
    assert tangent(X).abs().max() > 0.01


def test_it_is_the_tangent():
    """f(w* + h v) - f_lin(w* + h v) falls as h^2, so the slope agrees with finite differences."""
    optimum, gaps = network(1), []
    at = optimum.state_dict()
    for h in (1e-2, 1e-3):
        model = copy.deepcopy(optimum)
        direction = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += h * torch.randn(parameter.shape, generator=direction, dtype=torch.float64)
        gap = (linearized(model, at)(X) - model.eval()(X)).abs().max().item()
        change = (model(X) - optimum.eval()(X)).abs().max().item()
        assert gap < 10 * h * change
        gaps.append(gap)
    assert 50 < gaps[0] / gaps[1] < 200


def test_it_is_affine_in_its_weights():
    start, end, at = network(0), network(1), network(2).state_dict()
    middle = copy.deepcopy(start)
    with torch.no_grad():
        for parameter, other in zip(middle.parameters(), end.parameters(), strict=True):
            parameter.lerp_(other, 0.25)
    outputs = [linearized(model, at)(X) for model in (start, middle, end)]
    torch.testing.assert_close(outputs[1], torch.lerp(outputs[0], outputs[2], 0.25))


def test_a_linear_network_is_its_own_linearisation():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 3)).double()
    at = {name: torch.randn_like(w) for name, w in model.state_dict().items()}
    torch.testing.assert_close(linearized(model, at)(X), model(X))


@pytest.mark.parametrize("name", NAMES)
def test_its_adapter_is_that_of_the_network(name):
    """It has the same theta_d, tensors and P, so an adapter of the one loads onto the other."""
    case = BY_NAME[name]
    model = case.model()
    full = get_peft_model(copy.deepcopy(model), SubspaceConfig(**CONFIG)).eval()
    wrapped = get_peft_model(linearized(model), SubspaceConfig(**CONFIG))
    P, expected = dense_P(wrapped), dense_P(full)
    assert P.keys() == expected.keys()
    for tensor in P:
        assert torch.equal(P[tensor], expected[tensor])
    x = case.batch()
    torch.testing.assert_close(wrapped(x), full(x))
    size = 1e-3
    for m in (wrapped, full):
        move(m, size=size)
    with torch.no_grad():
        change, base = full(x) - model.eval()(x), model(x)
        torch.testing.assert_close(wrapped(x) - base, change, rtol=0.05, atol=0.05 * change.abs().max().item())
    assert change.abs().max() > 1e-5


def test_gradients_in_theta_d():
    """J is constant: the gradient is P^T J^T dl/df, the Hessian P^T J^T l'' J P, with J by autograd at the point."""
    model, optimum = network(0).float(), network(1).float()
    x = X.float()
    wrapped = get_peft_model(linearized(model, optimum.state_dict()), SubspaceConfig(**CONFIG))
    move(wrapped, size=0.1)
    vector = theta_d(wrapped)
    (gradient,) = torch.autograd.grad(cross_entropy(wrapped(x), LABELS), vector)

    at = dict(optimum.eval().named_parameters())
    J = torch.func.jacrev(lambda w: functional_call(optimum, w, (x,)))(at)
    P = dense_P(wrapped)
    JP = sum(J[name].reshape(5, 4, -1) @ P[name] for name in at)  # [n, classes, d]
    logits = wrapped(x).detach().requires_grad_()
    (outer,) = torch.autograd.grad(cross_entropy(logits, LABELS), logits)
    torch.testing.assert_close(gradient, torch.einsum("nc,ncd->d", outer, JP), rtol=1e-4, atol=1e-6)

    product = hessian_product(lambda: cross_entropy(wrapped(x), LABELS), [vector])
    p = logits.detach().softmax(1)
    curvature = (p.diag_embed() - p[:, :, None] * p[:, None]) / len(p)
    expected = torch.einsum("ncd,nce,nef->df", JP, curvature, JP)
    H = torch.stack([product(unit) for unit in torch.eye(7)])
    torch.testing.assert_close(H, expected, rtol=1e-3, atol=1e-5)


def test_it_trains_in_a_usual_loop_and_saves_an_adapter(tmp_path):
    model, optimum = network(0).float(), network(1).float()
    wrapped = get_peft_model(linearized(model, optimum.state_dict()), SubspaceConfig(**CONFIG | {"d": 40}))
    optimizer = torch.optim.Adam((p for p in wrapped.parameters() if p.requires_grad), lr=0.1)
    losses = []
    for _ in range(30):
        loss = cross_entropy(wrapped(X.float()), LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(model.head.weight, network(0).float().head.weight)
    assert (optimum.body[1].running_mean == network(1).float().body[1].running_mean).all()
    wrapped.save_pretrained(tmp_path)
    fresh = linearized(network(0).float(), optimum.state_dict())
    assert torch.equal(PeftModel.from_pretrained(fresh, tmp_path)(X.float()), wrapped(X.float()))
    PeftModel.from_pretrained(network(0).float(), tmp_path)


def test_copies_and_casts_include_the_point():
    tangent = linearized(network(0).float(), network(1).float().state_dict())
    expected = tangent(X.float())
    twin = copy.deepcopy(tangent).double()
    torch.testing.assert_close(twin(X).float(), expected)
    assert tangent._point.head.weight.dtype == torch.float32
    assert set(tangent.state_dict()) == {name for name, _ in network(0).named_parameters(remove_duplicate=False)}


def test_bad_models():
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        linearized(nn.Linear(2, 3), nn.Linear(3, 2).state_dict())

    class Pair(nn.Linear):
        def forward(self, x):
            return x, super().forward(x)

    with pytest.raises(TypeError, match="one tensor, got tuple; wrap the model"):
        linearized(Pair(2, 3))(torch.ones(1, 2))
