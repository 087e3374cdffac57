"""The update of B, equation (13), and its conditions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subspace_peft.optim.bfgs import updated


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 8), st.floats(1e-6, 1e6))
def test_the_update_is_equation_13(seed, d, size):
    generator = torch.Generator().manual_seed(seed)
    root, s, y = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((d, d), d, d))
    B, s, y = root @ root.T + torch.eye(d), s * size, y * size
    B = (B + B.T) / 2  # a product may be unsymmetric in its last bit
    new = updated(B, s, y)
    if not y @ s > torch.finfo(s.dtype).eps * y.norm() * s.norm():
        assert new is None
        return
    rho = 1 / (y @ s)
    V = torch.eye(d, dtype=torch.float64) - rho * torch.outer(y, s)
    expected = V.T @ B @ V + rho * torch.outer(s, s)
    torch.testing.assert_close(new, expected, rtol=1e-8, atol=1e-8 * expected.abs().max().item())
    assert torch.equal(new, new.T)
    torch.testing.assert_close(new @ y, s, rtol=1e-6, atol=1e-8 * new.norm().item() * y.norm().item())


@pytest.mark.parametrize("size", [1e-15, 1.0, 1e15])
def test_the_curvature_check_has_no_scale(size):
    B, s = torch.eye(2, dtype=torch.float64), torch.tensor([size, 0.0], dtype=torch.float64)
    assert updated(B, s, s) is not None
    assert updated(B, s, -s) is None
    assert updated(B, s, s.flip(0)) is None
    assert updated(B, s, s * float("nan")) is None
    assert updated(B, torch.zeros_like(s), s) is None
