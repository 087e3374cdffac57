"""Identity: theta_d is split once for all tensors, and again after every change."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from subspace_peft.projections import TensorRows
from subspace_peft.projections.identity import Identity
from tests.cases import BY_NAME, loss, theta_d, wrap
from tests.trajectory.walks import Allocations


SIZES = [3, 4, 2]


def projections():
    parts = [Identity(TensorRows(name=str(i), n=n, d=9, offset=sum(SIZES[:i]))) for i, n in enumerate(SIZES)]
    Identity.together(parts)
    return parts


def vector() -> nn.Parameter:
    return nn.Parameter(torch.arange(9.0))


def square(parts, theta_d):
    return sum((i + 1) * part(theta_d).square().sum() for i, part in enumerate(parts))


GRADIENT = torch.tensor([2.0] * 3 + [4.0] * 4 + [6.0] * 2)


def test_one_backward_for_all_tensors():
    theta_d, parts = vector(), projections()
    entries = [part(theta_d) for part in parts]
    assert len({tensor.grad_fn for tensor in entries}) == 1
    square(parts, theta_d).backward()
    torch.testing.assert_close(theta_d.grad, GRADIENT * theta_d.detach())


@pytest.mark.parametrize(
    "change",
    [
        lambda theta_d: theta_d.data.mul_(2),
        lambda theta_d: setattr(theta_d, "data", theta_d.data * 2),
        lambda theta_d: torch.optim.SGD([theta_d], lr=0.1).step(),
        lambda theta_d: torch.no_grad()(theta_d.add_)(1),
        lambda theta_d: None,
    ],
)
def test_every_change_of_theta_d_is_seen(change):
    theta_d, parts = vector(), projections()
    square(parts, theta_d).backward()
    change(theta_d)
    theta_d.grad = None
    for _ in range(2):  # gradients accumulate
        square(parts, theta_d).backward()
    torch.testing.assert_close(theta_d.grad, 2 * GRADIENT * theta_d.detach())


def test_another_vector_and_none_that_trains():
    one, other, parts = vector(), nn.Parameter(torch.ones(9)), projections()
    parts[0](one)
    assert torch.equal(parts[0](other), torch.ones(3))
    with torch.no_grad():
        assert not parts[1](one).requires_grad
    assert parts[1](one).requires_grad
    one.requires_grad_(False)
    assert not parts[1](one).requires_grad


def test_derivatives_of_higher_order_and_under_transforms():
    theta_d, parts = vector(), projections()
    (first,) = torch.autograd.grad(square(parts, theta_d), theta_d, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), theta_d)
    torch.testing.assert_close(second, GRADIENT)
    gradient = torch.func.grad(lambda x: square(parts, x))(theta_d)
    torch.testing.assert_close(gradient, first)
    rows = torch.func.vmap(lambda x: parts[1](x))(torch.stack([theta_d.detach(), -theta_d.detach()]))
    assert torch.equal(rows, torch.stack([theta_d[3:7], -theta_d[3:7]]).detach())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_parts(reentrant):
    theta_d, parts = vector(), projections()
    x = torch.ones((), requires_grad=True)
    total = sum(
        checkpoint(lambda x, i=i: x * (i + 1) * parts[i](theta_d).square().sum(), x, use_reentrant=reentrant)
        for i in range(3)
    )
    total.backward()
    torch.testing.assert_close(theta_d.grad, GRADIENT * theta_d.detach())


def test_copies_split_for_themselves():
    theta_d, parts = vector(), projections()
    square(parts, theta_d)
    for twins in (copy.deepcopy(parts), pickle.loads(pickle.dumps(parts))):
        assert len({id(twin.joint_cache) for twin in twins}) == 1
        other = vector()
        square(twins, other).backward()
        torch.testing.assert_close(other.grad, GRADIENT * other.detach())


def test_a_backward_makes_no_vector_of_D_for_each_tensor():
    case = BY_NAME["llama"]
    model = wrap(case, projection="identity", d=None)
    x, D = case.batch(), theta_d(model).numel()
    with torch.no_grad():
        model(x)
    whole = loss(model, x)
    vectors = []

    class Watch(Allocations):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = super().__torch_dispatch__(func, types, args, kwargs)
            if isinstance(out, torch.Tensor) and out.shape == (D,):
                vectors.append(func)
            return out

    with Watch():
        whole.backward()
    assert len(vectors) <= 3
    assert theta_d(model).grad.shape == (D,)
