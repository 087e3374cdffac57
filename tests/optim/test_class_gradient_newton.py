"""The step of ClassGradientNewton, by the poster's equation (6) and with the Gram matrix, against dense formulas."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from subspace_peft.optim import ClassGradientNewton, class_gradients
from tests.optim.classes import B, C, by_loop, data, flat, network


def closure(model, x, y):
    def evaluate():
        logits = model(x)
        return cross_entropy(logits, y), logits, y

    return evaluate


def step_of(optimizer, evaluate) -> torch.Tensor:
    """theta - theta' of one step."""
    params = optimizer.param_groups[0]["params"]
    before = flat(params).detach()
    optimizer.step(evaluate)
    return before - flat(params).detach()


def gradient(model, x, y) -> torch.Tensor:
    return flat(torch.autograd.grad(cross_entropy(model(x), y), list(model.parameters())))


# ---------------------------------------------------------------------------------------------------------- the update


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_the_posters_update(damping):
    model, (x, y) = network(), data()
    c, weight = by_loop(model, x, y)
    g, lr = gradient(model, x, y), 0.05
    v = c / c.norm(dim=1, keepdim=True)
    curvature = weight * c.norm(dim=1) ** 2
    expected = lr * g + ((1 / (curvature + damping) - lr) * (v @ g)) @ v
    optimizer = ClassGradientNewton(model.parameters(), lr=lr, damping=damping, gram=False, examples="own")
    torch.testing.assert_close(step_of(optimizer, closure(model, x, y)), expected)


@pytest.mark.parametrize("examples", ["own", "all"])
@pytest.mark.parametrize(("lr", "damping"), [(0.0, 0.0), (0.05, 0.0), (0.05, 0.1), (0.05, None)])
def test_with_the_gram_matrix_it_is_newtons_step_in_the_range_of_the_hessian(lr, damping, examples):
    """H^+ g in the range and lr g in the complement, for c_k that are not orthogonal."""
    model, (x, y) = network(), data()
    c, weight = by_loop(model, x, y)
    if examples == "all":
        p = model(x).detach().softmax(1)
        weight = (p * (1 - p)).mean(0)
    overlaps = torch.nn.functional.normalize(c) @ torch.nn.functional.normalize(c).T
    assert (overlaps - torch.eye(C)).abs().max().item() > 0.1
    g, H = gradient(model, x, y), torch.einsum("k,ki,kj->ij", weight, c, c)
    values, vectors = torch.linalg.eigh(H)
    values, vectors = values[-C:], vectors[:, -C:]
    used_damping = 1 / (10 * lr) if damping is None else damping
    inside = vectors.T @ g
    expected = lr * (g - vectors @ inside) + vectors @ (inside / (values + used_damping))
    optimizer = ClassGradientNewton(model.parameters(), lr=lr, damping=damping, examples=examples)
    step = step_of(optimizer, closure(model, x, y))
    torch.testing.assert_close(step, expected, rtol=1e-6, atol=1e-9)
    if not lr and not damping:
        torch.testing.assert_close(step, torch.linalg.pinv(H, rtol=1e-9, hermitian=True) @ g, rtol=1e-6, atol=1e-9)


def test_classes_of_one_direction():
    """All c_k in one direction: a single eigenvector, and no division by the zero eigenvalues."""
    theta = nn.Parameter(torch.tensor([0.3, -0.2], dtype=torch.float64))
    x, y = torch.ones(6, 1).double(), torch.tensor([0, 1, 2, 0, 1, 2])
    scales = torch.tensor([1.0, 2.0, -1.0]).double()
    evaluate = closure(lambda x: x * theta[0] * scales, x, y)
    optimizer = ClassGradientNewton([theta], lr=0.1, damping=0.0, examples="own")
    loss, logits, _ = evaluate()
    g = torch.autograd.grad(loss, theta, retain_graph=True)[0]
    p = logits[0].softmax(0)
    curvature = (p * (1 - p) * scales.square()).mean().item()
    step = step_of(optimizer, evaluate)
    assert step[0].item() == pytest.approx(g[0].item() / curvature)
    assert step[1].item() == 0


@pytest.mark.parametrize("gram", [True, False])
def test_the_default_damping_bounds_the_step(gram):
    """One wrong label where every p is almost 0 or 1: there is a gradient, but c_k c_k^T has almost no curvature."""
    theta, lr = nn.Parameter(torch.tensor([20.0, 0, 0, 0], dtype=torch.float64)), 0.01
    evaluate = closure(lambda x: x * theta, torch.ones(B, 1).double(), torch.tensor([0] * (B - 1) + [1]))
    g = torch.autograd.grad(evaluate()[0], theta)[0]
    start = theta.detach().clone()
    step = step_of(ClassGradientNewton([theta], lr=lr, gram=gram, examples="own"), evaluate)
    assert step.norm().item() == pytest.approx(10 * lr * g.norm().item(), rel=1e-3)
    theta.data.copy_(start)
    undamped = step_of(ClassGradientNewton([theta], lr=lr, gram=gram, damping=0.0, examples="own"), evaluate)
    assert undamped.norm() > 1e6 * lr * g.norm()


# ------------------------------------------------------------------------------------------------------------ averages


def test_averages():
    """v_k is the direction of its exponential average; lambda_k its exponential average, corrected for the start."""
    model, average = network(), 0.8
    optimizer = ClassGradientNewton(
        model.parameters(), lr=0.0, damping=1e9, average=average, gram=False, examples="own"
    )
    mean, v, total = torch.zeros(C).double(), 0, 0
    for seed in range(3):
        x, _ = data(seed=seed)
        y = torch.arange(C).repeat(B // C)  # every class has the same share, to which lambda_k is proportional
        c, weight = by_loop(model, x, y)
        v = average * v + (1 - average) * torch.nn.functional.normalize(c)
        mean = average * mean + (1 - average) * weight * c.norm(dim=1) ** 2
        total = average * total + 1 - average
        optimizer.step(closure(model, x, y))
    optimizer.param_groups[0]["damping"] = 0.0
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    torch.testing.assert_close(state["v"], v, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(state["share"] * state["curvature"] / state["mass"], mean / total, rtol=1e-6, atol=1e-8)


def test_a_rare_class_keeps_its_average_and_its_share():
    """The class is in one of four batches: lambda_k is its mean times its share, as in one large batch."""
    model, (x, _) = network(), data(8)
    y = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    with_rare = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    optimizer = ClassGradientNewton(model.parameters(), lr=0.0, damping=1e9, examples="own")
    optimizer.step(closure(model, x, with_rare))
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    rare = state["v"][3].clone(), state["curvature"][3].item()
    for _ in range(3):
        optimizer.step(closure(model, x, y))
    assert torch.equal(state["v"][3], rare[0])
    assert state["curvature"][3].item() == rare[1]
    assert state["share"].sum().item() == pytest.approx(1)
    assert state["share"][3].item() == pytest.approx(2 / 32)
    large = class_gradients(model(x.repeat(4, 1)), torch.cat([with_rare, y, y, y]), model.parameters())
    expected = large.weight[3] * large.c[3].norm() ** 2
    curvature = state["share"][3] * state["curvature"][3] / state["mass"][3]
    assert curvature.item() == pytest.approx(expected.item(), rel=1e-6)


def test_shares_count_all_examples_in_batches_of_any_size():
    model, (x, y) = network(), data()
    optimizer = ClassGradientNewton(model.parameters(), lr=0.0, damping=1e9, examples="own")
    for part in (y, y[:5], torch.full_like(y, -100)):
        optimizer.step(lambda part=part: (model(x[: len(part)]).sum(), model(x[: len(part)]), part))
    expected = torch.bincount(torch.cat([y, y[:5]]), minlength=C) / (len(y) + 5)
    share = optimizer.state[optimizer.param_groups[0]["params"][0]]["share"]
    torch.testing.assert_close(share, expected.double())


def test_frozen_parameters_are_passed_over():
    steps = []
    for whole in (True, False):
        model, (x, y) = network(), data()
        model[0].requires_grad_(False)
        optimizer = ClassGradientNewton((model if whole else model[2]).parameters(), lr=0.1)
        steps.append(step_of(optimizer, closure(model, x, y)))
    assert torch.equal(*steps)


def test_one_class_alone():
    model, (x, y) = network(), data()
    optimizer = ClassGradientNewton(model.parameters(), lr=0.1)
    step = step_of(optimizer, closure(model, x, torch.zeros_like(y)))
    assert step.isfinite().all()
    assert step.any()


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "`lr` must not be negative, got -1.0"),
        ({"lr": 0.1, "average": 1.0}, "`average` must be at least 0 and below 1, got 1.0"),
        ({"lr": 0.1, "damping": -0.1}, "`damping` must not be negative, got -0.1; leave it out"),
        ({"lr": 0.1, "examples": "each"}, "`examples` must be one of own, all, got 'each'"),
    ],
)
def test_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ClassGradientNewton(network().parameters(), **settings)


def test_parameters_that_are_not_one_group():
    model = network()
    with pytest.raises(ValueError, match="one group of float32 or float64 parameters.*with \\['torch.float16'\\]"):
        ClassGradientNewton([nn.Parameter(torch.zeros(2).half())], lr=0.1)
    with pytest.raises(ValueError, match="group 2"):
        ClassGradientNewton([{"params": model[0].parameters()}, {"params": model[2].parameters()}], lr=0.1)


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (lambda loss, z, y: loss, TypeError, "three tensors, \\(loss, logits, labels\\), got Tensor"),
        (lambda loss, z, y: None, TypeError, "got NoneType"),
        (lambda loss, z, y: (loss, z), TypeError, "got \\['Tensor', 'Tensor'\\]"),
        (lambda loss, z, y: (loss.detach(), z, y), ValueError, "with their graph; do not detach"),
        (lambda loss, z, y: (loss, z.detach(), y), ValueError, "`logits` must come with their graph"),
        (lambda loss, z, y: (z, z, y), ValueError, "must return one number as the loss"),
        (lambda loss, z, y: (loss, z, y + C), ValueError, "more classes than logits"),
    ],
)
def test_closures_that_return_too_little(returned, error, message):
    model, (x, y) = network(), data()
    before = flat(model.parameters()).clone()
    with pytest.raises(error, match=message):
        ClassGradientNewton(model.parameters(), lr=0.1).step(lambda: returned(*closure(model, x, y)()))
    assert torch.equal(flat(model.parameters()), before)


def test_other_logits_than_before():
    model, (x, y) = network(), data()
    optimizer = ClassGradientNewton(model.parameters(), lr=0.1)
    optimizer.step(closure(model, x, y))
    with pytest.raises(ValueError, match="must be those of the steps before, \\[C, n\\] = \\[4, 64\\]"):
        optimizer.step(lambda: (model(x).sum(), model(x)[:, :3], y.clamp(max=2)))
