"""Small tensors computed together: the same P, computed again after every change of theta_d."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from subspace_peft.projections import PROJECTIONS, TensorRows, joint
from tests.cases import BY_NAME, loss, theta_d, wrap
from tests.projections.cases import explicit, random


D = 70
SIZES = [300, 5, 128, 1, 1000, 64]
KINDS = [("fastfood", None), ("fastjl", None), ("sparse", None), ("sparse", 3)]
SCALES = [0.5, torch.linspace(1, 2, D)]


def members(name, nnz=None, d=D, sizes=SIZES, **changes):
    projections = [
        PROJECTIONS[name](TensorRows(**{"name": str(i), "n": n, "d": d, "nnz_per_row": nnz} | changes))
        for i, n in enumerate(sizes)
    ]
    return projections, PROJECTIONS[name].together(projections)


def vector() -> nn.Parameter:
    return nn.Parameter(random(D, dtype=torch.float32))


def square(parts, joint_cache, theta_d, scale=0.5):
    """A sum over the tensors, computed as layers do: each asks for z and for the entries of one tensor."""
    total = 0
    for i, part in enumerate(parts):
        z = joint_cache.normalised(theta_d, scale)
        total = total + (i + 1) * part(theta_d * scale if z is None else z).square().sum()
    return total


def expected(parts, theta_d, scale=0.5):
    """The same sum from the matrices, and its gradient."""
    x = theta_d.detach().double().requires_grad_()
    total = sum((i + 1) * (explicit(part) @ (x * scale)).square().sum() for i, part in enumerate(parts))
    return total, torch.autograd.grad(total, x)[0].float()


def alone(parts):
    twins = copy.deepcopy(parts)
    for twin in twins:
        twin.joint_cache = None
    return twins


@pytest.mark.parametrize("d", [1, D, 200, 2100])
@pytest.mark.parametrize(("name", "nnz"), KINDS)
def test_the_same_numbers_as_alone(name, nnz, d):
    """Up to float32, in which a small P is held."""
    parts, joint_cache = members(name, nnz if d > 1 else None, d)
    (joint_map,) = joint_cache.joints
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 1e-1)):
        z = random(2, 3, d, dtype=dtype)
        whole = joint_map.apply(z)
        assert whole.dtype == dtype
        entries = whole.split([n for extent in joint_map.extents for n in extent], -1)[::2]
        for part, y in zip(alone(parts), entries, strict=True):
            torch.testing.assert_close(y, part(z), rtol=tolerance, atol=tolerance * d**0.5)
    g = random(2, 3, whole.shape[-1])
    z = random(2, 3, d)
    torch.testing.assert_close((joint_map.apply(z) * g).sum(), (z * joint_map.adjoint(g)).sum())


@pytest.mark.parametrize("scale", SCALES, ids=["rows", "columns"])
@pytest.mark.parametrize(("name", "nnz"), KINDS)
def test_gradients(name, nnz, scale):
    parts, joint_cache = members(name, nnz)
    theta_d = vector()
    total, gradient = expected(alone(parts), theta_d, scale)
    for times in (1, 2, 3):  # gradients accumulate, each through the same graph
        square_sum = square(parts, joint_cache, theta_d, scale)
        square_sum.backward()
        torch.testing.assert_close(square_sum, total.float())
        torch.testing.assert_close(theta_d.grad, times * gradient, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "change",
    [
        lambda theta_d: theta_d.data.mul_(2),
        lambda theta_d: setattr(theta_d, "data", theta_d.data * 2),
        lambda theta_d: torch.optim.SGD([theta_d], lr=1e-6).step(),
        lambda theta_d: torch.no_grad()(theta_d.add_)(1),
        lambda theta_d: theta_d.data.fill_(float("nan")),
        lambda theta_d: None,
    ],
)
def test_every_change_of_theta_d_is_seen(change):
    parts, joint_cache = members("fastjl")
    theta_d = vector()
    square(parts, joint_cache, theta_d).backward()
    change(theta_d)
    theta_d.grad = None
    square(parts, joint_cache, theta_d).backward()
    gradient = expected(alone(parts), theta_d)[1]
    torch.testing.assert_close(theta_d.grad, gradient, rtol=1e-4, atol=1e-3, equal_nan=True)


def test_other_vectors_scales_and_modes():
    parts, joint_cache = members("fastjl")
    one, other = vector(), nn.Parameter(torch.ones(D))
    z = joint_cache.normalised(one, 0.5)
    assert joint_cache.normalised(one, 0.5) is z
    assert parts[0](z).grad_fn is not None
    assert torch.equal(joint_cache.normalised(other, 0.5), torch.full((D,), 0.5))
    assert torch.equal(joint_cache.normalised(other, 0.25), torch.full((D,), 0.25))
    assert parts[0].joint_cache.entries(z, parts[0]) is None
    with torch.no_grad():
        assert not joint_cache.normalised(other, 0.25).requires_grad
    with torch.inference_mode():
        assert joint_cache.normalised(other, 0.25).is_inference()
    assert not joint_cache.normalised(other, 0.25).is_inference()
    assert joint_cache.normalised(other, 0.25).requires_grad
    other.requires_grad_(False)
    assert not joint_cache.normalised(other, 0.25).requires_grad


def test_transforms_bypass_the_cache():
    parts, joint_cache = members("fastfood")
    theta_d = vector()
    gradient = torch.func.grad(lambda x: square(parts, joint_cache, x))(theta_d.detach())
    torch.testing.assert_close(gradient, expected(alone(parts), theta_d)[1], rtol=1e-4, atol=1e-3)
    x = torch.ones(())
    torch.func.grad(lambda x: (x * square(parts, joint_cache, theta_d)).sum())(x)
    torch.func.vmap(lambda x: x * square(parts, joint_cache, theta_d))(torch.ones(3))
    square(parts, joint_cache, theta_d).backward()
    torch.testing.assert_close(theta_d.grad, gradient, rtol=1e-4, atol=1e-3)
    (first,) = torch.autograd.grad(square(parts, joint_cache, theta_d), theta_d, create_graph=True)
    (second,) = torch.autograd.grad(first @ theta_d.detach(), theta_d)
    torch.testing.assert_close(second, first.detach(), rtol=1e-4, atol=1e-3)  # the sum is a quadratic form


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_parts(reentrant):
    parts, joint_cache = members("fastjl")
    theta_d, x = vector(), torch.ones((), requires_grad=True)
    total = sum(
        (i + 1)
        * checkpoint(lambda x, i=i: x * square(parts[i : i + 1], joint_cache, theta_d), x, use_reentrant=reentrant)
        for i in range(len(parts))
    )
    total.backward()
    torch.testing.assert_close(theta_d.grad, expected(alone(parts), theta_d)[1], rtol=1e-4, atol=1e-3)


def test_copies_have_a_cache_of_their_own():
    parts, joint_cache = members("fastjl")
    square(parts, joint_cache, vector())
    for twins in (copy.deepcopy(parts), pickle.loads(pickle.dumps(parts))):
        (others,) = {twin.joint_cache for twin in twins}
        assert others is not joint_cache
        other = vector()
        square(twins, others, other).backward()
        torch.testing.assert_close(other.grad, expected(alone(parts), other)[1], rtol=1e-4, atol=1e-3)


def test_the_cache_is_freed_with_the_model():
    """A graph that led back to the cache that holds it would never be collected."""
    parts, joint_cache = members("fastjl")
    square(parts, joint_cache, vector()).backward()
    reference = weakref.ref(joint_cache)
    del parts, joint_cache
    gc.collect()
    assert reference() is None


def test_another_dtype_or_graph_is_seen():
    parts, joint_cache = members("fastjl")
    theta_d, fired = vector(), []
    square(parts, joint_cache, theta_d)
    theta_d.data = theta_d.data.bfloat16()
    assert joint_cache.normalised(theta_d, 0.5).dtype == torch.bfloat16
    theta_d.data = theta_d.data.double()
    assert joint_cache.normalised(theta_d, 0.5) is None  # alone, as where torch.func computes it
    theta_d.data = theta_d.data.float()
    square(parts, joint_cache, theta_d)
    theta_d.data = theta_d.data.double()
    theta_d.data = theta_d.data.float()  # each change of the dtype makes another node in which gradients end
    node = torch.autograd.graph.get_gradient_edge(theta_d).node
    node.register_hook(lambda *_: fired.append(1))
    square(parts, joint_cache, theta_d).backward()
    assert fired == [1]


def test_a_nan_is_the_same_number(monkeypatch):
    parts, joint_cache = members("fastjl")
    theta_d, calls = nn.Parameter(torch.full((D,), torch.nan)), []
    before = type(joint_cache.joints[0]).apply
    monkeypatch.setattr(type(joint_cache.joints[0]), "apply", lambda self, z: calls.append(1) or before(self, z))
    square(parts, joint_cache, theta_d)
    assert calls == [1]


@pytest.mark.parametrize("name", ["fastfood", "fastjl", "sparse"])
def test_without_the_cache_no_state_is_held(name):
    gradients = []
    for cache in (True, False):
        parts, joint_cache = members(name, cache=cache)
        theta_d = vector()
        square(parts, joint_cache, theta_d).backward()
        gradients.append(theta_d.grad)
        assert [bool(joint_map._drawn) for joint_map in joint_cache.joints] == [cache]
    assert torch.equal(*gradients)


def test_entries_are_those_of_the_grad_mode():
    parts, joint_cache = members("fastjl")
    theta_d = vector()
    z = joint_cache.normalised(theta_d, 0.5)
    with torch.no_grad():
        assert not parts[0](z).requires_grad
    assert parts[0](z).requires_grad


def test_the_caller_gets_a_copy():
    parts, joint_cache = members("fastjl")
    with torch.no_grad():
        z = joint_cache.normalised(vector(), 0.5)
        first = parts[0](z)
        expected = first.clone()
        first.zero_()
        torch.testing.assert_close(parts[0](z), expected)


def test_which_tensors_join(monkeypatch):
    monkeypatch.setattr(joint, "MEMBER_ENTRIES", 500)
    monkeypatch.setattr(joint, "JOINT_ENTRIES", 300)
    monkeypatch.setattr(joint, "CACHE_ENTRIES", 900)
    parts, joint_cache = members("sparse", sizes=[100, 501, 150, 40, 200, 100, 500, 7])
    assert [[part.rows.n for part in each.members] for each in joint_cache.joints] == [[100, 150, 40], [200, 100]]
    assert not {part for each in joint_cache.joints for part in each.members} & set(parts)
    assert [part.rows.n for part in parts if part.joint_cache is None] == [501, 500, 7]
    assert members("sparse", sizes=[100, 501])[1] is None
    assert members("sparse", given=(torch.zeros(1),))[1] is None
    assert members("sparse", d=395, sizes=[50, 60])[1] is not None
    assert members("sparse", d=396, sizes=[50, 60])[1] is None  # z is held too
    assert members("fastjl", 2)[1] is None
    assert members("dense")[1] is None


@pytest.mark.parametrize("name", ["fastfood", "fastjl", "sparse"])
def test_a_step_of_a_model_applies_each_joint_once(name, monkeypatch):
    case = BY_NAME["llama"]
    model = wrap(case, projection=name)
    calls = []
    kind = type(next(m for m in model.modules() if hasattr(m, "joint_caches")).joint_caches["default"].joints[0])
    for method in ("apply", "adjoint"):
        f = getattr(kind, method)
        monkeypatch.setattr(kind, method, lambda self, x, method=method, f=f: calls.append(method) or f(self, x))
    loss(model, case.batch()).backward()
    assert calls == ["apply", "adjoint"]
    with torch.no_grad():
        model(case.batch())
        model(case.batch())
    assert calls == ["apply", "adjoint", "apply"]
    assert theta_d(model).grad.norm() > 0
