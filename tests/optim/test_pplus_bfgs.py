"""P+-BFGS: a step inside the subspace and one outside of it (Li et al. 2021, section 4.4)."""

import copy

import pytest
import torch

from subspace_peft.optim import PBFGS, PPlusBFGS
from tests.optim.problems import PROBLEMS, Closure, quadratic, vector


def columns() -> torch.Tensor:
    P, _ = torch.linalg.qr(torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    return P


def test_a_step_of_pplus_is_the_papers():
    """w + P s - lr m, s the step of P-BFGS in the subspace, m the momentum of the gradient outside of it."""
    P, lr, momentum = columns(), 0.02, 0.7
    weights, theta_d = torch.nn.Parameter(torch.zeros(6, dtype=torch.float64)), vector(0.0, 0.0)
    optimizer = PPlusBFGS([theta_d], [weights], lambda x: [P @ x], lr=lr, momentum=momentum)
    alone = vector(0.0, 0.0)
    inside = PBFGS([alone])
    m = torch.zeros(6, dtype=torch.float64)
    for _ in range(4):
        w = (weights + P @ theta_d).detach()
        g = torch.func.grad(quadratic)(w)
        m = momentum * m + g - P @ (P.T @ g)
        base = weights.detach().clone()
        inside.step(Closure(alone, lambda x, base=base: quadratic(base + P @ x)))
        optimizer.step(PROBLEMS["quadratic"].closure(optimizer, lambda: weights + P @ theta_d))
        torch.testing.assert_close(theta_d, alone)
        torch.testing.assert_close(weights, base - lr * m)
        assert (P.T @ weights).abs().max().item() < 1e-12  # only theta_d moves in the subspace


def test_pplus_steps_outside_where_there_is_no_step_inside():
    P, theta_d = columns(), vector(0.0, 0.0)
    weights = torch.nn.Parameter(torch.zeros(6, dtype=torch.float64))
    optimizer = PPlusBFGS([theta_d], [weights], lambda x: [P @ x], search=lambda evaluate, loss, slope: None)
    with pytest.warns(UserWarning, match="No step"):
        optimizer.step(PROBLEMS["quadratic"].closure(optimizer, lambda: weights + P @ theta_d))
    assert not theta_d.any()
    assert weights.abs().max().item() > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lift": lambda x: [2 * columns() @ x]}, "orthonormal columns, it stretches a vector by 2"),
        ({"lift": lambda x: [x]}, "`lift` must return tensors shaped as `weights`, \\[\\[6\\]\\], got \\[\\[2\\]\\]"),
        ({"weights": [torch.zeros(6)]}, "`weights` must be float32 or float64 and require gradients"),
        ({"momentum": 1.0}, "`momentum` must be at least 0 and below 1, got 1.0"),
        ({"params": [vector(0.0), vector(0.0)]}, "PPlusBFGS must be given theta_d alone"),
    ],
)
def test_arguments_of_pplus(changes, message):
    good = {"params": [vector(0.0, 0.0)], "lift": lambda x: [columns() @ x]}
    good["weights"] = [torch.nn.Parameter(torch.zeros(6, dtype=torch.float64))]
    PPlusBFGS(**good)
    with pytest.raises(ValueError, match=message):
        PPlusBFGS(**good | changes)


@pytest.mark.parametrize(
    "form", [lambda p: p, lambda p: [("theta_d", p)], lambda p: [{"params": [p]}], lambda p: [{"params": [("a", p)]}]]
)
def test_forms_of_parameters(form):
    weights, theta_d = torch.nn.Parameter(torch.zeros(6, dtype=torch.float64)), vector(0.0, 0.0)
    optimizer = PPlusBFGS(form(theta_d), [weights], lambda x: [columns() @ x])
    assert [group["params"] for group in optimizer.param_groups] == [[theta_d], [weights]]
    optimizer.step(PROBLEMS["quadratic"].closure(optimizer, lambda: weights + columns() @ theta_d))
    assert theta_d.any()
    copied = copy.deepcopy(optimizer)
    assert copied.lift is optimizer.lift
    (state,), (its,) = ([o.state[o.param_groups[0]["params"][0]]["B"]] for o in (optimizer, copied))
    assert torch.equal(state, its)


def test_pplus_needs_a_gradient_on_every_weight():
    P, theta_d = columns(), vector(0.0, 0.0)
    weights = torch.nn.Parameter(torch.zeros(6, dtype=torch.float64))
    optimizer = PPlusBFGS([theta_d], [weights], lambda x: [P @ x])
    with pytest.raises(ValueError, match="every parameter of PPlusBFGS, one of shape \\[6\\] has none"):
        optimizer.step(Closure(theta_d, lambda x: quadratic(P @ x)))
