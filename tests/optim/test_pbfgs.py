"""P-BFGS: what a step evaluates and where it ends, and the rules that the paper leaves open."""

import pytest
import scipy.optimize
import torch

from subspace_peft.optim import PBFGS, Armijo, Step
from tests.optim.problems import Closure, quadratic, quadratic_matrix, rosenbrock, vector


def exact(evaluate, loss, slope) -> Step:
    """The minimum along the line of a quadratic loss: phi(a) = loss + slope a + b a^2."""
    b = evaluate(1.0) - loss - slope
    alpha = -slope / (2 * b)
    return Step(alpha, evaluate(alpha), 2)


# -------------------------------------------------------------------------------------------------------------- a step


@pytest.mark.parametrize("curvature", ["same_batch", "next_batch"])
def test_d_exact_steps_solve_a_quadratic(curvature):
    """With an exact search BFGS from I takes conjugate directions: d steps suffice, then B is the inverse Hessian."""
    x = vector(*[0.0] * 6)
    optimizer = PBFGS([x], search=exact, curvature=curvature)
    closure = Closure(x, quadratic)
    for _ in range(6):
        optimizer.step(closure)
    assert (x - 1).abs().max().item() < 1e-7
    if curvature == "same_batch":
        A = quadratic_matrix()
        assert (optimizer.state[x]["B"] @ A - torch.eye(6)).abs().max().item() < 1e-5


def test_scipy_finds_the_same_minimum():
    start = [1.3, 0.7, 0.8, 1.9]
    x = vector(*start)
    optimizer = PBFGS([x])
    for _ in range(80):
        optimizer.step(Closure(x, rosenbrock))
    expected = scipy.optimize.minimize(
        lambda w: rosenbrock(torch.tensor(w)).item(), start, jac=scipy.optimize.rosen_der, method="BFGS"
    )
    assert expected.fun < 1e-9
    assert x.tolist() == pytest.approx(expected.x, abs=1e-6)


def test_both_curvatures_agree_on_one_batch():
    ends = []
    for curvature in ("same_batch", "next_batch"):
        x = vector(-1.2, 1.0)
        optimizer = PBFGS([x], curvature=curvature)
        for _ in range(12):
            optimizer.step(Closure(x, rosenbrock))
        ends.append(x.detach())
    assert torch.equal(*ends)


def flat(x):
    return 0.5 * (0.9 * x.square()).sum()


def steep(x):
    return 0.5 * (6 * x.square()).sum()


@pytest.mark.parametrize(
    ("curvature", "loss", "calls"),
    [
        ("same_batch", flat, "gradient gradient"),
        ("same_batch", steep, "gradient gradient forward forward forward gradient"),
        ("next_batch", flat, "gradient forward"),
        ("next_batch", steep, "gradient forward forward forward forward"),
    ],
)
def test_what_a_step_evaluates(curvature, loss, calls):
    """The Hessian 6 I needs alpha <= 0.2, the fourth trial."""
    x = vector(1.0, 2.0)
    closure = Closure(x, loss)
    PBFGS([x], curvature=curvature).step(closure)
    assert closure.calls == calls.split()


def test_a_closure_that_always_calls_backward_costs_more():
    ends = []
    for always, calls in ((True, "gradient gradient forward gradient gradient gradient"), (False, None)):
        x = vector(1.0, 2.0)
        optimizer, closure = PBFGS([x]), Closure(x, steep, always)
        optimizer.step(closure)
        assert calls is None or closure.calls == calls.split()
        closure.calls.clear()
        optimizer.step(closure)
        assert "forward" not in closure.calls
        ends.append(x.detach())
    assert torch.equal(*ends)


def test_another_error_in_a_trial_is_raised_and_theta_d_is_unchanged():
    x = vector(1.0, 2.0)
    evaluate = Closure(x, steep)

    def closure():
        if len(evaluate.calls) == 2:
            raise RuntimeError("out of something")
        return evaluate()

    with pytest.raises(RuntimeError, match="out of something"):
        PBFGS([x]).step(closure)
    assert x.tolist() == [1.0, 2.0]


def test_step_returns_the_loss_before_it():
    x = vector(1.0, 2.0)
    assert PBFGS([x]).step(Closure(x, flat)).item() == pytest.approx(2.25)
    assert PBFGS([x]).step(lambda: (flat(x).backward() if torch.is_grad_enabled() else None, flat(x).item())[1]) > 0


# --------------------------------------------------------------------------------------------------------------- rules


def only_at(x, point, loss):
    """The loss at one point, NaN everywhere else."""
    return loss(x) if torch.equal(x.detach(), torch.tensor(point, dtype=x.dtype)) else loss(x) * float("nan")


def test_no_step_along_the_negative_gradient():
    x = vector(1.0, 2.0)
    optimizer = PBFGS([x], search=Armijo(max_trials=3))
    closure = Closure(x, lambda x: only_at(x, [1.0, 2.0], flat))
    with pytest.warns(UserWarning, match="No step along the negative gradient lowered the loss enough in 3 trials"):
        optimizer.step(closure)
    assert x.tolist() == [1.0, 2.0]
    optimizer.step(closure)  # only the first in a row warns
    state = optimizer.state[x]
    assert (state["stuck"], state["alpha"], state["trials"], state["resets"]) == (2, 0.0, 3, 0)
    optimizer.step(Closure(x, flat))
    assert (state["stuck"], state["alpha"]) == (0, 1.0)


@pytest.mark.parametrize("curvature", ["same_batch", "next_batch"])
def test_no_step_along_another_direction_resets_B(curvature):
    x = vector(1.0, 2.0)
    optimizer = PBFGS([x], search=Armijo(max_trials=3), curvature=curvature)
    for _ in range(2):
        optimizer.step(Closure(x, flat))
    point = x.tolist()
    optimizer.step(Closure(x, lambda x: only_at(x, point, flat)))
    state = optimizer.state[x]
    assert x.tolist() == point
    assert torch.equal(state["B"], torch.eye(2, dtype=x.dtype))
    assert (state["resets"], state["updates"], state["stuck"]) == (1, 0, 0)
    assert "s" not in state


@pytest.mark.parametrize("error", [-1.0, 0.0, float("nan"), float("inf")])
def test_a_B_without_descent_is_reset(error):
    x = vector(1.0, 2.0)
    optimizer, fresh = PBFGS([x]), vector(1.0, 2.0)
    optimizer.step(Closure(x, flat))
    optimizer.state[x]["B"] *= error
    fresh.data.copy_(x)
    optimizer.step(Closure(x, flat))
    PBFGS([fresh]).step(Closure(fresh, flat))
    assert torch.equal(x, fresh)
    assert optimizer.state[x]["resets"] == 1


def test_a_zero_gradient_ends_the_step():
    x = vector(0.0, 0.0)
    optimizer, closure = PBFGS([x]), Closure(x, flat)
    optimizer.step(closure)
    assert closure.calls == ["gradient"]
    assert x.tolist() == [0.0, 0.0]


def test_rounding_of_the_loss_stops_no_step():
    """Near a loss of 100 in float32, rounding hides the decrease while the gradient is still 1e-3."""
    x = vector(*[0.0] * 6, dtype=torch.float32)
    optimizer = PBFGS([x])
    for _ in range(30):
        optimizer.step(Closure(x, lambda x: quadratic(x) + 100))
    assert (x - 1).abs().max().item() < 1e-3


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([vector(1.0), vector(2.0)], "theta_d alone, one vector in one group, got 2 parameters.*modules_to_save"),
        ([{"params": [vector(1.0)]}, {"params": [vector(1.0)]}], "got 1 parameters in group 2"),
        (
            [{"params": [vector(1.0)]}, {"params": []}],
            "got an empty group, such as transformers' Trainer.*SubspaceTrainer",
        ),
        ([torch.nn.Parameter(torch.zeros(2, 2))], "must be given a vector, got shape \\[2, 2\\]; flatten it"),
        ([vector(1.0, dtype=torch.bfloat16)], "float32 or float64, got torch.bfloat16"),
        ([("theta_d", vector(1.0, dtype=torch.float16))], "got torch.float16"),
    ],
)
def test_parameters_that_are_not_one_vector(params, message):
    with pytest.raises(ValueError, match=message):
        PBFGS(params)


def test_frozen_parameters_are_passed_over():
    """As torch's optimisers do: `parameters()` of an adapted model holds the frozen base."""
    frozen, x = torch.nn.Parameter(torch.ones(2, 2), requires_grad=False), vector(0.0, 0.0)
    for params in ([frozen, x], [("base", frozen), ("theta_d", x)], [{"params": iter([x, frozen])}]):
        optimizer = PBFGS(params)
        assert [each is x for each in optimizer.param_groups[0]["params"]] == [True]
        optimizer.step(Closure(x, quadratic_of_two))
    assert torch.equal(frozen, torch.ones(2, 2))
    assert x.any()
    with pytest.raises(ValueError, match="got 2 parameters in group 1, besides frozen ones"):
        PBFGS([frozen, x, vector(1.0)])


def quadratic_of_two(x):
    return (x - 1).square().sum()


def test_arguments():
    with pytest.raises(ValueError, match="`curvature` must be one of same_batch, next_batch, got 'both'"):
        PBFGS([vector(1.0)], curvature="both")
    with pytest.raises(ValueError, match="`lr` must not be negative"):
        PBFGS([vector(1.0)], lr=-1.0)
    optimizer = PBFGS([("theta_d", vector(1.0))])
    with pytest.raises(ValueError, match="in group 2"):
        optimizer.add_param_group({"params": vector(2.0)})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (lambda x: None, TypeError, "must return the loss, got NoneType; end it with `return loss`"),
        (lambda x: (x.sum(), x), TypeError, "must return the loss, got tuple"),
        (lambda x: x * 1, ValueError, "must return one number as the loss, got shape \\[2\\]; return loss.mean()"),
        (lambda x: x.sum(), ValueError, "must leave a gradient on every parameter.*call loss.backward()"),
        (lambda x: x.detach().sum(), ValueError, "must leave a gradient"),
    ],
)
def test_closures_that_return_or_leave_too_little(returned, error, message):
    x = vector(1.0, 2.0)
    x.grad = torch.ones_like(x)  # from elsewhere: it must not count as the closure's
    with pytest.raises(error, match=message):
        PBFGS([x]).step(lambda: returned(x))
    assert x.tolist() == [1.0, 2.0]
