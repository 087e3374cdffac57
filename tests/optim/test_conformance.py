"""Every optimiser on every problem that it can solve. A new optimiser is tested by joining OPTIMIZERS."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from subspace_peft.optim import PBFGS, ClassGradientNewton, PPlusBFGS
from tests.optim.problems import PROBLEMS, Closure


def plus(x: Tensor, curvature: str = "same_batch") -> tuple[Optimizer, Callable[[], Tensor]]:
    """P+-BFGS with the weights x and two orthonormal columns."""
    generator = torch.Generator().manual_seed(2)
    P, _ = torch.linalg.qr(torch.randn(len(x), 2, generator=generator).to(x.dtype))
    theta_d = torch.nn.Parameter(torch.zeros(2, dtype=x.dtype))
    return PPlusBFGS([theta_d], [x], lambda z: [P @ z], curvature=curvature), lambda: x + P @ theta_d


@dataclass(frozen=True)
class Member:
    """`make` returns an optimiser and its point, which starts at x; `reaches` says after how many steps which loss."""

    name: str
    make: Callable[[Tensor], tuple[Optimizer, Callable[[], Tensor]]]
    reaches: dict[str, tuple[int, float]]

    def __repr__(self) -> str:
        return self.name


EASY = {"quadratic": (20, 1e-10), "rosenbrock": (60, 1e-10), "network": (50, 1.4)}
OPTIMIZERS = [
    Member("pbfgs", lambda x: (PBFGS([x]), lambda: x), EASY),
    Member("pbfgs next_batch", lambda x: (PBFGS([x], curvature="next_batch"), lambda: x), EASY),
    Member("pplus", plus, {"quadratic": (150, 1e-3), "network": (50, 2.2)}),
    Member("pplus next_batch", lambda x: plus(x, "next_batch"), {"quadratic": (150, 1e-3), "network": (50, 2.2)}),
    Member("class_gradient", lambda x: (ClassGradientNewton([x], lr=0.03), lambda: x), {"network": (60, 2.1)}),
    Member("poster", lambda x: (ClassGradientNewton([x], lr=0.03, gram=False), lambda: x), {"network": (60, 2.2)}),
]
PAIRS = [(member, problem) for member in OPTIMIZERS for problem in member.reaches]
ids = [f"{member}-{problem}" for member, problem in PAIRS]


class Run:
    """An optimiser on a problem; its parameters in the order of its groups."""

    def __init__(self, member: Member, problem: str, dtype: torch.dtype = torch.float64):
        self.problem = PROBLEMS[problem]
        self.optimizer, self.point = member.make(self.problem.parameter(dtype))
        self.closure = self.problem.closure(self.optimizer, self.point)

    def steps(self, count: int) -> list[float]:
        return [self.optimizer.step(self.closure).item() for _ in range(count)]

    @property
    def parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def save(self) -> io.BytesIO:
        file = io.BytesIO()
        torch.save({"parameters": self.parameters, "optimizer": self.optimizer.state_dict()}, file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO) -> None:
        saved = torch.load(file, weights_only=True)
        for parameter, value in zip(self.parameters, saved["parameters"], strict=True):
            parameter.data.copy_(value)
        self.optimizer.load_state_dict(saved["optimizer"])


@pytest.mark.parametrize(("member", "problem"), PAIRS, ids=ids)
def test_it_converges(member, problem):
    run = Run(member, problem)
    steps, loss = member.reaches[problem]
    assert run.problem.loss(run.point()).item() > loss
    run.steps(steps)
    assert run.problem.loss(run.point()).item() < loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("member", "problem"), PAIRS, ids=ids)
def test_it_resumes_to_the_bit(member, problem, dtype):
    run, resumed = Run(member, problem, dtype), Run(member, problem, dtype)
    run.steps(5)
    file = run.save()
    expected = run.steps(5)
    resumed.load(file)
    assert resumed.steps(5) == expected
    assert torch.equal(resumed.point(), run.point())


@pytest.mark.parametrize("again", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
@pytest.mark.parametrize("member", [member for member in OPTIMIZERS if "bfgs" in member.name], ids=str)
def test_a_copy_goes_on_to_the_bit(member, again):
    run = Run(member, "rosenbrock")
    run.steps(3)
    copied = again(run.optimizer)
    (mine,), (its,) = run.parameters, copied.param_groups[0]["params"]
    start, expected = mine.detach().clone(), run.steps(3)
    assert torch.equal(its, start)
    closure = Closure(its, run.problem.loss)
    assert [copied.step(closure).item() for _ in range(3)] == expected
    assert torch.equal(its, mine)


@pytest.mark.parametrize("member", OPTIMIZERS, ids=str)
def test_without_a_closure(member):
    run = Run(member, "network")
    assert type(run.optimizer).needs_closure is True
    with pytest.raises(TypeError, match=r"Call step\(closure\).*subspace_peft.trainer.SubspaceTrainer"):
        run.optimizer.step()


@pytest.mark.parametrize("member", OPTIMIZERS, ids=str)
def test_a_start_that_is_not_finite_changes_nothing(member):
    run = Run(member, "network")
    run.steps(2)
    point, state = run.point().detach().clone(), run.save().getvalue()
    nan = torch.tensor(float("nan"), dtype=torch.float64)
    broken = run.problem.closure(run.optimizer, lambda: run.point() * nan)
    with pytest.raises(FloatingPointError, match="must be finite.*nothing is changed"):
        run.optimizer.step(broken)
    assert torch.equal(run.point(), point)
    assert run.save().getvalue() == state


@pytest.mark.parametrize("member", OPTIMIZERS, ids=str)
def test_a_gradient_scaler_is_refused(member):
    """A scaler that gets the closure by position, as from accelerate, would step on scaled gradients."""
    run = Run(member, "network")
    run.steps(1)
    point, scaler = run.point().detach().clone(), torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))  # creates the scale
    with pytest.raises(ValueError, match=f"{type(run.optimizer).__name__} must be stepped without a gradient scaler"):
        scaler.step(run.optimizer, run.closure)
    assert torch.equal(run.point(), point)
    run.steps(1)
    assert not torch.equal(run.point(), point)


@pytest.mark.parametrize("member", OPTIMIZERS, ids=str)
def test_a_scheduler_scales_every_step(member):
    run = Run(member, "network")
    scheduler = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: 0.0 if step else 1.0)
    start = run.point().detach().clone()
    run.steps(1)
    scheduler.step()
    point = run.point().detach().clone()
    assert not torch.equal(point, start)
    run.steps(1)
    assert torch.equal(run.point(), point)
