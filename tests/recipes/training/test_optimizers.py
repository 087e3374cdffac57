import pytest
import torch

from recipes.training.optimizers import SCHEDULES, LarsenAdam


@pytest.mark.parametrize(("step", "factor"), [(1, 1.0), (12, 2.08), (100, 1.02), (469, 0.52), (1407, 0.36)])
def test_larsens_adam_moves_by_these_multiples_of_lr(step, factor):
    """Of a constant gradient; the figures are those of the published code's formula."""
    p = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = LarsenAdam([p], lr=0.05)
    for _ in range(step):
        before = p.detach().clone()
        p.grad = torch.tensor([3.0, -2.0], dtype=torch.float64)
        optimizer.step()
    torch.testing.assert_close(
        (before - p.detach()) / 0.05, factor * torch.tensor([1.0, -1]).double(), atol=6e-3, rtol=0
    )


def test_a_staircase_has_four_steps():
    assert [SCHEDULES["staircase"](t, 0) for t in (0, 0.24, 0.25, 0.5, 0.99, 1)] == [1, 1, 0.3, 0.1, 0.03, 0.03]
