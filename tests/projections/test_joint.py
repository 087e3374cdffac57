"""Small tensors made together: the same P, seen anew whatever becomes of theta_d between two uses."""

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
FACTORS = [0.5, torch.linspace(1, 2, D)]


def members(name, nnz=None, d=D, sizes=SIZES, **changes):
    made = [
        PROJECTIONS[name](TensorRows(**{"name": str(i), "n": n, "d": d, "nnz_per_row": nnz} | changes))
        for i, n in enumerate(sizes)
    ]
    return made, PROJECTIONS[name].together(made)


def vector() -> nn.Parameter:
    return nn.Parameter(random(D, dtype=torch.float32))


def square(parts, joint_cache, theta_d, factor=0.5):
    """A sum over the tensors, made as layers make it: each asks for z and for its own tensor."""
    total = 0
    for i, part in enumerate(parts):
        z = joint_cache.normalised(theta_d, factor)
        total = total + (i + 1) * part(theta_d * factor if z is None else z).square().sum()
    return total


def expected(parts, theta_d, factor=0.5):
    """The same from the matrices, and its gradient."""
    x = theta_d.detach().double().requires_grad_()
    total = sum((i + 1) * (explicit(part) @ (x * factor)).square().sum() for i, part in enumerate(parts))
    return total, torch.autograd.grad(total, x)[0].float()


def alone(parts):
    twins = copy.deepcopy(parts)
    for twin in twins:
        twin.joint_cache = None
    return twins


@pytest.mark.parametrize("d", [1, D, 200, 2100])
@pytest.mark.parametrize(("name", "nnz"), KINDS)
def test_the_same_numbers_as_alone(name, nnz, d):
    """Up to float32: few rows of P are held in it."""
    parts, joint_cache = members(name, nnz if d > 1 else None, d)
    (one,) = joint_cache.joints
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 1e-1)):
        z = random(2, 3, d, dtype=dtype)
        whole = one.apply(z)
        assert whole.dtype == dtype
        for part, piece in zip(alone(parts), whole.split([n for e in one.extents for n in e], -1)[::2], strict=True):
            torch.testing.assert_close(piece, part(z), rtol=tolerance, atol=tolerance * d**0.5)
    g = random(2, 3, whole.shape[-1])
    torch.testing.assert_close((one.apply(random(2, 3, d)) * g).sum(), (random(2, 3, d) * one.adjoint(g)).sum())


@pytest.mark.parametrize("factor", FACTORS, ids=["rows", "columns"])
@pytest.mark.parametrize(("name", "nnz"), KINDS)
def test_gradients(name, nnz, factor):
    parts, joint_cache = members(name, nnz)
    theta_d = vector()
    total, gradient = expected(alone(parts), theta_d, factor)
    for times in (1, 2, 3):  # gradients add up, each through the same graph
        found = square(parts, joint_cache, theta_d, factor)
        found.backward()
        torch.testing.assert_close(found, total.float())
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
def test_what_changed_theta_d_is_seen(change):
    parts, joint_cache = members("fastjl")
    theta_d = vector()
    square(parts, joint_cache, theta_d).backward()
    change(theta_d)
    theta_d.grad = None
    square(parts, joint_cache, theta_d).backward()
    gradient = expected(alone(parts), theta_d)[1]
    torch.testing.assert_close(theta_d.grad, gradient, rtol=1e-4, atol=1e-3, equal_nan=True)


def test_what_else_changes():
    parts, joint_cache = members("fastjl")
    one, other = vector(), nn.Parameter(torch.ones(D))
    z = joint_cache.normalised(one, 0.5)
    assert joint_cache.normalised(one, 0.5) is z
    assert parts[0](z).grad_fn is not None
    assert torch.equal(joint_cache.normalised(other, 0.5), torch.full((D,), 0.5))
    assert torch.equal(joint_cache.normalised(other, 0.25), torch.full((D,), 0.25))
    assert parts[0].joint_cache.piece(z, parts[0]) is None
    with torch.no_grad():
        assert not joint_cache.normalised(other, 0.25).requires_grad
    with torch.inference_mode():
        assert joint_cache.normalised(other, 0.25).is_inference()
    assert not joint_cache.normalised(other, 0.25).is_inference()
    assert joint_cache.normalised(other, 0.25).requires_grad
    other.requires_grad_(False)
    assert not joint_cache.normalised(other, 0.25).requires_grad


def test_under_transforms_nothing_is_kept():
    parts, joint_cache = members("fastfood")
    theta_d = vector()
    found = torch.func.grad(lambda x: square(parts, joint_cache, x))(theta_d.detach())
    torch.testing.assert_close(found, expected(alone(parts), theta_d)[1], rtol=1e-4, atol=1e-3)
    x = torch.ones(())
    torch.func.grad(lambda x: (x * square(parts, joint_cache, theta_d)).sum())(x)
    torch.func.vmap(lambda x: x * square(parts, joint_cache, theta_d))(torch.ones(3))
    square(parts, joint_cache, theta_d).backward()
    torch.testing.assert_close(theta_d.grad, found, rtol=1e-4, atol=1e-3)
    (first,) = torch.autograd.grad(square(parts, joint_cache, theta_d), theta_d, create_graph=True)
    (second,) = torch.autograd.grad(first @ theta_d.detach(), theta_d)
    torch.testing.assert_close(second, first.detach(), rtol=1e-4, atol=1e-3)  # of a quadratic form


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


def test_copies_are_made_anew():
    parts, joint_cache = members("fastjl")
    square(parts, joint_cache, vector())
    for twins in (copy.deepcopy(parts), pickle.loads(pickle.dumps(parts))):
        (others,) = {twin.joint_cache for twin in twins}
        assert others is not joint_cache
        other = vector()
        square(twins, others, other).backward()
        torch.testing.assert_close(other.grad, expected(alone(parts), other)[1], rtol=1e-4, atol=1e-3)


def test_what_is_kept_goes_with_the_model():
    """A graph that led back to what is kept of it would never be collected."""
    parts, joint_cache = members("fastjl")
    square(parts, joint_cache, vector()).backward()
    gone = weakref.ref(joint_cache)
    del parts, joint_cache
    gc.collect()
    assert gone() is None


def test_another_dtype_or_graph_is_seen():
    parts, joint_cache = members("fastjl")
    theta_d, fired = vector(), []
    square(parts, joint_cache, theta_d)
    theta_d.data = theta_d.data.double()
    assert joint_cache.normalised(theta_d, 0.5).dtype == torch.float64
    theta_d.data = theta_d.data.float()
    square(parts, joint_cache, theta_d)
    theta_d.data = theta_d.data.double()
    theta_d.data = theta_d.data.float()  # with each change of the dtype gradients end in another node
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
def test_without_the_cache_nothing_of_P_is_kept(name):
    found = []
    for cache in (True, False):
        parts, joint_cache = members(name, cache=cache)
        theta_d = vector()
        square(parts, joint_cache, theta_d).backward()
        found.append(theta_d.grad)
        assert [bool(one._drawn) for one in joint_cache.joints] == [cache]
    assert torch.equal(*found)


def test_a_z_serves_the_mode_it_was_made_in():
    parts, joint_cache = members("fastjl")
    theta_d = vector()
    z = joint_cache.normalised(theta_d, 0.5)
    with torch.no_grad():
        assert not parts[0](z).requires_grad
    assert parts[0](z).requires_grad


def test_what_is_handed_out_is_a_copy():
    parts, joint_cache = members("fastjl")
    with torch.no_grad():
        z = joint_cache.normalised(vector(), 0.5)
        first = parts[0](z)
        expected = first.clone()
        first.zero_()
        torch.testing.assert_close(parts[0](z), expected)


def test_who_is_made_together(monkeypatch):
    monkeypatch.setattr(joint, "SMALL", 500)
    monkeypatch.setattr(joint, "TOGETHER", 300)
    monkeypatch.setattr(joint, "KEPT", 900)
    parts, joint_cache = members("sparse", sizes=[100, 501, 150, 40, 200, 100, 500, 7])
    assert [[part.rows.n for part in one.members] for one in joint_cache.joints] == [[100, 150, 40], [200, 100]]
    assert not {part for one in joint_cache.joints for part in one.members} & set(parts)
    assert [part.rows.n for part in parts if part.joint_cache is None] == [501, 500, 7]
    assert members("sparse", sizes=[100, 501])[1] is None
    assert members("sparse", given=(torch.zeros(1),))[1] is None
    assert members("sparse", d=395, sizes=[50, 60])[1] is not None
    assert members("sparse", d=396, sizes=[50, 60])[1] is None  # z is kept too
    assert members("fastjl", 2)[1] is None
    assert members("dense")[1] is None


@pytest.mark.parametrize("name", ["fastfood", "fastjl", "sparse"])
def test_a_step_of_a_model_applies_each_joint_once(name, monkeypatch):
    case = BY_NAME["llama"]
    model = wrap(case, projection=name)
    calls = []
    kind = type(next(m for m in model.modules() if hasattr(m, "joint_caches")).joint_caches["default"].joints[0])
    for way in ("apply", "adjoint"):
        before = getattr(kind, way)
        monkeypatch.setattr(kind, way, lambda self, x, way=way, before=before: calls.append(way) or before(self, x))
    loss(model, case.batch()).backward()
    assert calls == ["apply", "adjoint"]
    with torch.no_grad():
        model(case.batch())
        model(case.batch())
    assert calls == ["apply", "adjoint", "apply"]
    assert theta_d(model).grad.norm() > 0
