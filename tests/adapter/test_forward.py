"""Forward: the ways in which a layer runs its base module, with hooks on it and in several threads."""

import copy
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from subspace_peft import SubspaceConfig
from subspace_peft.adapter.layer import SubspaceLayer
from tests.adapter.test_forming import SIDE, base_of, inputs, wrapped
from tests.cases import BY_NAME, REPLACED, REPLACED_TARGETS, move, outputs, replaced, run, theta_d, wrap
from tests.trajectory.walks import Allocations


LOW_RANK = {"coordinates": "low_rank", "rank": 2}


def test_a_layer_with_a_replaced_weight_runs_as_two_smaller_ones():
    """Neither the product nor its gradient is formed, and the weight is not read."""
    model = get_peft_model(
        nn.Sequential(nn.Linear(400, 300)),
        SubspaceConfig(**{**REPLACED, "target_modules": ["0"], "projection": "identity", "d": None}),
    )
    x = torch.randn(2, 400)
    model(x).sum().backward()
    with torch.no_grad():
        model.base_model.model[0].base_layer.weight.fill_(torch.nan)
    with FlopCounterMode(display=False) as flops, Allocations() as allocations:
        model(x).sum().backward()
    assert theta_d(model).grad.isfinite().all()
    assert flops.get_total_flops() <= 3 * 2 * 2 * 2 * (400 + 300)
    assert allocations.peak < 4 * 300 * 400


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mlp", "convnet", "embeddings"])
def test_replaced_weights_in_half_precision(name, dtype):
    case = BY_NAME[name]
    base = case.model().to(dtype)
    model = get_peft_model(base, SubspaceConfig(**{**REPLACED, "target_modules": REPLACED_TARGETS[name]})).eval()
    x = case.batch()
    output = run(model, x.to(dtype) if x.is_floating_point() else x)
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), outputs(replaced(name), case), rtol=0.1, atol=0.1)
    output.float().sum().backward()
    assert theta_d(model).grad.dtype == torch.float32
    assert theta_d(model).grad.isfinite().all()


def test_the_layer_of_a_linear_runs_low_rank_through_both_factors():
    """The product of size rows x columns is not formed where x can go through A and B in turn."""
    model = wrap(BY_NAME["mlp"], coordinates="low_rank", rank=2, d=9, parameters=["weight"])
    move(model)
    layer = model.base_model.model.fc1
    assert isinstance(layer, SubspaceLayer)
    assert isinstance(layer.base_layer, nn.Linear)
    formed = []
    layer.coordinates["default"]["weight"].increment = lambda z: formed.append(z)
    layer(torch.randn(2, 6))
    assert not formed


HOOKS = {
    "read before": lambda base: base.register_forward_pre_hook(lambda _, args: args[0] / base.weight.norm()),
    "run again": lambda base: base.register_forward_hook(lambda _, args, output: output + base.forward(args[0])),
    "written to": lambda base: base.register_forward_pre_hook(lambda *_: base.weight.mul_(0.5) is None or None),
}


@pytest.mark.parametrize("projection", ["fastjl", "dense"])
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("kind", ["linear", "conv1d of transformers"])
def test_a_weight_that_hooks_use_too(kind, hook, projection):
    base = base_of(kind)
    model = wrapped(copy.deepcopy(base), projection)
    HOOKS[hook](model.base_model.model[1].base_layer)
    x, v = inputs(), torch.randn(20, generator=torch.Generator().manual_seed(3))

    def loss():
        return model(x).double().square().mean()

    value = loss()
    (once,) = torch.autograd.grad(value, theta_d(model), retain_graph=True)
    (again,) = torch.autograd.grad(value, theta_d(model))
    assert torch.equal(once, again)
    ends = []
    for step in (1e-3, -2e-3):
        with torch.no_grad():
            theta_d(model).add_(v, alpha=step)
            ends.append(loss().item())
    assert (once @ v).item() == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=1e-2)


class _Around(ModelHook):
    """As accelerate moves what enters a module and what leaves it."""

    def pre_forward(self, module, *args, **kwargs):
        return (2 * args[0], *args[1:]), kwargs

    def post_forward(self, module, output):
        return -output


def replace_forward(base: nn.Module) -> None:
    own = base.forward
    base.forward = lambda x: own(x).relu() + 1


GIVEN = {
    "a hook of accelerate's": lambda base: add_hook_to_module(base, _Around()),
    "a hook that was removed": lambda base: remove_hook_from_module(add_hook_to_module(base, _Around())),
    "a forward of its own": replace_forward,
    "both": lambda base: (replace_forward(base), add_hook_to_module(base, _Around())),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("changes", [{"projection": "kronecker"}, {"projection": "sparse"}, LOW_RANK], ids=str)
@pytest.mark.parametrize("given", GIVEN)
@torch.no_grad()
def test_a_module_that_was_given_another_forward(given, changes, dtype):
    """A plain module with the moved weight, and the same forward."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(512, 512)).to(dtype)
    plain, x = copy.deepcopy(base), torch.randn(20, 512, dtype=dtype)
    model = get_peft_model(base, SubspaceConfig(d=40, target_modules=["0"], init_weights=False, **changes)).eval()
    layer = model.base_model.model[0]
    plain[0].weight += layer.get_delta_weight("default").to(dtype)
    plain[0].bias += layer.increments(["default"]).get("bias", torch.zeros(512)).to(dtype)
    for module in (layer.base_layer, plain[0]):
        GIVEN[given](module)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(model(x), plain(x), rtol=tolerance, atol=tolerance * plain(x).abs().max().item())


def test_threads_run_one_model_at_once():
    model = wrapped(nn.Sequential(nn.LayerNorm(SIDE), nn.Linear(SIDE, 512), nn.Tanh(), nn.Linear(512, 512)))
    x = inputs()
    with torch.no_grad():
        expected = model(x)

    def run(_):
        with torch.no_grad():
            return torch.equal(model(x), expected)

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(run, range(100)))
    assert run(0)


class Other(nn.Linear):
    """Run by another method than forward."""

    def other(self, x):
        return super().forward(x)


class ByMethod(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Other(64, 256)

    def forward(self, x):
        return self.inner.other(x)


class ByWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Embedding(400, 64)

    def forward(self, x):
        return self.inner(x.abs().mul(100).long().clamp_max(399)) @ self.inner.weight.T


@pytest.mark.parametrize("projection", ["fastjl", "kronecker"])
@pytest.mark.parametrize("kind", [ByMethod, ByWeight])
def test_threads_read_and_run_what_is_not_forward(kind, projection):
    torch.manual_seed(0)
    model = get_peft_model(kind(), SubspaceConfig(d=20, projection=projection, target_modules=["inner"]))
    move(model, size=0.05)
    x = torch.randn(8, 64)
    with torch.no_grad():
        expected = model(x)

    def right(_):
        with torch.no_grad():
            return torch.allclose(model(x), expected, atol=1e-5)

    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as threads:
            assert all(threads.map(right, range(200)))
    finally:
        sys.setswitchinterval(switching)
    assert right(0)


def test_threads_have_backward_passes_at_once():
    models = [wrapped(base_of("recurrent")) for _ in range(4)]
    x = inputs().detach()
    expected = torch.autograd.grad(models[0](x).sum(), theta_d(models[0]))[0]

    def run(model):
        return [torch.autograd.grad(model(x).sum(), theta_d(model))[0] for _ in range(10)]

    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as threads:
            found = [gradient for gradients in threads.map(run, models) for gradient in gradients]
    finally:
        sys.setswitchinterval(switching)
    assert all(torch.allclose(gradient, expected, rtol=1e-4) for gradient in found)
