"""TwoFactors against the Kronecker product itself."""

import pytest
import torch

from subspace_peft.projections.two_factors import TwoFactors


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("has_origin", [False, True])
def test_blocks_and_their_adjoint(k, has_origin):
    torch.manual_seed(0)
    F_1, F_2, v = torch.randn(8, 8), torch.randn(16, 16), torch.randn(k, 128)
    c, origin, g = torch.randn(5, 128), torch.randn(5 * k * 128), torch.randn(5, k, 128)
    F_1, F_2, v, c, origin, g = (x.double() for x in (F_1, F_2, v, c, origin, g))
    F, pair, out = torch.kron(F_1, F_2), TwoFactors(F_1, F_2, k), torch.empty_like(origin)
    pair.blocks(pair.matrices(v), c, out, origin if has_origin else None)
    expected = ((c.unsqueeze(1) * v) @ F.T).flatten()
    torch.testing.assert_close(out, expected + origin if has_origin else expected)
    total = torch.zeros(k, 8, 16, 16, dtype=torch.float64)
    pair.add_adjoint(total, c[:3], g[:3].flatten())
    pair.add_adjoint(total, c[3:], g[3:].flatten())
    torch.testing.assert_close(pair.adjoint(total), (c.unsqueeze(1) * (g @ F)).sum(0, keepdim=True))
