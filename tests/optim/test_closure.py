"""repeatable: every evaluation of a step is of the same function."""

import pytest
import torch
from torch import nn

from subspace_peft.optim import PBFGS, repeatable


class Network(nn.Module):
    """Dropout, batch norm, and a buffer that the output depends on."""

    def __init__(self):
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))

    def forward(self, x):
        return self.linear(self.dropout(self.norm(x)))


def build():
    torch.manual_seed(0)
    return Network().train(), torch.randn(8, 4)


def buffers(model):
    return [buffer.clone() for buffer in model.buffers()]


def test_further_evaluations_repeat_the_first():
    model, x = build()
    closure = repeatable(lambda: model(x).sum(), model)
    values = [closure().item() for _ in range(4)]
    assert values[1:] == values[:1] * 3
    assert repeatable(lambda: model(x).sum(), model)().item() != values[0]


def test_buffers_and_random_numbers_advance_once():
    once, x = build()
    once(x)
    after = torch.rand(1)
    model, x = build()
    before = buffers(model)
    closure = repeatable(lambda: model(x).sum(), model)
    for _ in range(4):
        closure()
    assert torch.equal(torch.rand(1), after)
    assert not all(map(torch.equal, before, buffers(model)))
    assert all(map(torch.equal, buffers(once), buffers(model)))
    assert model.norm.num_batches_tracked == 1


def test_buffers_that_are_expanded_made_by_the_forward_or_grow():
    class Kept(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.ones(1).expand(4))
            self.register_buffer("cache", torch.zeros(0), persistent=False)
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("sparse", torch.eye(2).to_sparse())

        def forward(self, x):
            if not hasattr(self, "made"):
                self.register_buffer("made", torch.full((4,), 2.0), persistent=False)
            self.cache = torch.cat([self.cache, torch.ones(1)])
            self.calls += 1
            return self.scale * self.made * x * self.calls

    model, x = Kept(), torch.randn(8, 4)
    closure = repeatable(lambda: model(x).sum(), model)
    values = [closure().item() for _ in range(3)]
    assert values == [2 * x.sum().item()] * 3
    assert model.calls == 1


def test_an_evaluation_that_fails_leaves_no_trace():
    model, x = build()
    calls = []

    def closure():
        calls.append(model(x).sum().item())
        if len(calls) == 2:
            raise RuntimeError("once")
        return calls[-1]

    repeated = repeatable(closure, model)
    repeated()
    after, state = buffers(model), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="once"):
        repeated()
    assert all(map(torch.equal, after, buffers(model)))
    assert torch.equal(torch.get_rng_state(), state)
    assert repeated() == calls[0]


def test_statistics_advance_once_a_step_of_a_line_search():
    model, x = build()
    theta_d = nn.Parameter(torch.zeros(4))
    optimizer = PBFGS([theta_d])
    evaluations = []

    def closure():
        optimizer.zero_grad()
        loss = (model(x + theta_d) - 1).square().mean() + 20 * (theta_d - 1).square().sum()
        if torch.is_grad_enabled():
            loss.backward()
        evaluations.append(loss.item())
        return loss

    for step in range(1, 5):
        optimizer.step(repeatable(closure, model))
        assert model.norm.num_batches_tracked == step
    assert len(evaluations) > 8
    assert evaluations[-1] < evaluations[0]
