"""origin + P theta_d as one operation, against the sum of the two."""

import pytest
import torch
from torch.func import grad, jvp, vmap

from subspace_peft.projections import PROJECTIONS, TensorRows


P = PROJECTIONS["fastfood"](TensorRows(name="w", n=12, d=5))
Z = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
ORIGINS = torch.randn(7, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def move(z, origin):
    return P(z, origin)


def apart(z, origin):
    return P(z).view_as(origin) + origin


def test_it_is_the_sum():
    assert torch.equal(move(Z[0], ORIGINS[0]), apart(Z[0], ORIGINS[0]))
    torch.testing.assert_close(move(Z, ORIGINS[0]), torch.stack([apart(z, ORIGINS[0]) for z in Z]))


def test_derivatives_of_both_inputs_to_second_order():
    inputs = Z[0].clone().requires_grad_(), ORIGINS[0].clone().requires_grad_()
    assert torch.autograd.gradcheck(move, inputs)
    assert torch.autograd.gradgradcheck(move, inputs)


@pytest.mark.parametrize("dims", [(0, None), (None, 0), (0, 0)])
def test_vmap(dims):
    z, origin = Z if dims[0] == 0 else Z[0], ORIGINS if dims[1] == 0 else ORIGINS[0]
    expected = torch.stack(
        [apart(Z[i] if dims[0] == 0 else z, ORIGINS[i] if dims[1] == 0 else origin) for i in range(7)]
    )
    torch.testing.assert_close(vmap(move, dims)(z, origin), expected)


def test_func_grad_and_jvp():
    torch.testing.assert_close(
        grad(lambda z: move(z, ORIGINS[0]).sum())(Z[0]), grad(lambda z: apart(z, ORIGINS[0]).sum())(Z[0])
    )
    tangents = jvp(move, (Z[0], ORIGINS[0]), (Z[1], ORIGINS[1]))[1]
    torch.testing.assert_close(tangents, apart(Z[1], ORIGINS[1]))


def test_the_origin_is_left_alone():
    before = ORIGINS[0].clone()
    move(Z[0], ORIGINS[0])
    assert torch.equal(ORIGINS[0], before)
