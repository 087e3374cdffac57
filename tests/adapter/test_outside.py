"""Outside: what parents read from a target, run on it and set on it is the moved module's."""

import copy
import pickle

import pytest
import torch
from peft import get_peft_model
from torch import nn

from tests.adapter.readers import MODELS, Doubled, Fused, Looped, Sequence, moved_pair, x
from tests.cases import dense_P, settings, theta_d


@pytest.fixture(params=MODELS, ids=lambda kind: kind.__name__)
def pair(request):
    """A wrapped model at some theta_d, and a plain copy with the moved tensors."""
    return moved_pair(request.param)


def test_outputs_are_those_of_the_moved_model(pair):
    model, plain = pair
    torch.testing.assert_close(model(x()), plain(x()), rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x()), plain.eval()(x()), rtol=1e-6, atol=1e-6)


def test_the_gradient_is_P_transposed_times_that_of_the_moved_model(pair):
    model, plain = pair
    model(x()).square().sum().backward()
    plain(x()).square().sum().backward()
    expected = sum(P.double().T @ plain.get_parameter(name).grad.flatten() for name, P in dense_P(model).items())
    torch.testing.assert_close(theta_d(model).grad, expected, rtol=1e-5, atol=1e-6)


def test_merged_disabled_and_unloaded_models_agree(pair):
    model, _ = pair
    with torch.no_grad():
        expected = model(x())
        model.merge_adapter()
        torch.testing.assert_close(model(x()), expected)
        model.unmerge_adapter()
        with model.disable_adapter():
            base = model(x())
        assert not torch.allclose(base, expected, atol=1e-3)
        torch.testing.assert_close(model.unload()(x()), base)


def test_second_derivatives_pass_through_what_is_read():
    for coordinates in ({}, {"coordinates": "low_rank", "rank": 2, "parameters": ["weight"]}):
        model, _ = moved_pair(Looped, **coordinates)
        vector = theta_d(model)

        def gradient(vector=vector, model=model):
            return torch.autograd.grad(model(x()).square().sum(), vector, create_graph=True)[0]

        direction = torch.ones_like(vector)
        curvature = torch.autograd.grad(gradient() @ direction, vector)[0]
        with torch.no_grad():
            vector += 1e-5 * direction
            after = gradient_at(model, vector)
            vector -= 2e-5 * direction
            before = gradient_at(model, vector)
        torch.testing.assert_close(curvature, (after - before) / 2e-5, rtol=1e-4, atol=1e-5)


def gradient_at(model, vector):
    with torch.enable_grad():
        return torch.autograd.grad(model(x()).square().sum(), vector)[0]


def test_a_parameter_read_several_times_in_a_step_is_made_once(monkeypatch):
    model, _ = moved_pair(Looped)
    cell = model.base_model.model.cell
    assert cell.weight is cell.weight
    first = cell.weight
    with torch.no_grad():
        theta_d(model).data.add_(1)
    assert cell.weight is not first
    read = cell.weight
    model(x()).sum().backward()
    assert cell.weight is not read


def test_what_is_written_to_the_origin_is_read_at_the_next_forward():
    model, _ = moved_pair(Looped)
    model(x())
    model.base_model.model.cell.base_layer.weight.data.mul_(2)
    expected = model(x())
    with torch.no_grad():
        torch.testing.assert_close(model(x()), expected)


def test_shape_dtype_and_device_cost_nothing(monkeypatch):
    model, _ = moved_pair(Fused)
    weight = model.base_model.model.qkv.weight
    monkeypatch.setattr(type(weight.source), "entries", lambda self: pytest.fail("the entries were computed"))
    base = model.base_model.model.qkv.base_layer.weight
    assert (weight.shape, weight.dtype, weight.device) == (base.shape, base.dtype, base.device)
    assert weight.requires_grad
    assert weight.ndim == weight.dim() == 2
    assert weight.size(0) == len(weight) == 8


def test_what_looks_at_memory_sees_the_moved_tensor():
    model, plain = moved_pair(Fused)
    weight, expected = model.base_model.model.qkv.weight.detach(), plain.qkv.weight.detach()
    torch.testing.assert_close(torch.from_numpy(weight.numpy()), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.tensor(weight.tolist()).double(), expected, rtol=1e-6, atol=1e-6)
    for copied in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert type(copied) is torch.Tensor
        torch.testing.assert_close(copied, expected, rtol=1e-6, atol=1e-6)
    assert "MovedTensor" in repr(weight)


def test_what_is_read_must_not_be_written_to():
    model, _ = moved_pair(Fused)
    layer = model.base_model.model.qkv
    before = copy.deepcopy(layer.base_layer.weight)
    with torch.no_grad():
        for write in (
            lambda: layer.weight.zero_(),
            lambda: layer.weight.data.mul_(2),
            lambda: nn.init.normal_(layer.weight),
            lambda: layer.weight.copy_(before),
            lambda: layer.weight.data[0].zero_(),
            lambda: layer.weight[:2, 1].fill_(1),
            lambda: layer.weight.chunk(2)[1].mul_(2),
            lambda: torch._foreach_mul_([layer.weight], 2),
            lambda: torch.add(before, 1, out=layer.weight.detach()),
            lambda: layer.weight.data.clamp_(-1e-3, 1e-3),
            lambda: setattr(layer.weight, "data", before),
            layer.reset_parameters,
        ):
            with pytest.raises(RuntimeError, match="must not be written to, `weight` of Linear is computed"):
                write()
    assert torch.equal(layer.base_layer.weight, before)


def test_a_write_that_changes_nothing_may_be_made():
    """As the clamp of Gemma 3n's weights, which their bounds are far from."""
    model, plain = moved_pair(Fused)
    layer = model.base_model.model.qkv
    out, random = torch.ones(2), torch.get_rng_state()
    with torch.no_grad():
        for weight in (layer.weight.data, layer.weight.data[1:]):
            with pytest.warns(UserWarning, match="changes nothing now, and is refused where it does: A para"):
                assert type(weight.clamp_(-100, 100)) is type(weight)
        with pytest.warns(UserWarning, match="changes nothing now"):
            torch._foreach_mul_([layer.weight, layer.weight[0]], 1)
        assert torch.mul(layer.weight[0, :2], 0, out=out) is out
        for write in (lambda: torch._foreach_mul_([out, layer.weight], 2), lambda: layer.weight.normal_()):
            with pytest.raises(RuntimeError, match="must not be written to"):
                write()
    assert torch.equal(out, torch.zeros(2))
    assert torch.equal(torch.get_rng_state(), random)
    torch.testing.assert_close(layer.weight.detach().plain().double(), plain.qkv.weight.detach())
    with pytest.raises(RuntimeError, match="leave it out of what is adapted: `qkv.weight`"):
        layer.weight.data.zero_()


def test_assignments_reach_the_base_module_or_are_refused():
    model, _ = moved_pair(Fused, parameters=["weight"])
    layer = model.base_model.model.qkv
    with pytest.raises(ValueError, match="must stay the same, `weight` of Linear was given another"):
        layer.weight = nn.Parameter(torch.zeros(8, 8))
    with pytest.raises(ValueError, match="must stay the same, `weight` of Linear was given another"):
        layer.weight = None
    layer.weight = layer.weight  # tying what is tied
    with torch.no_grad():
        layer.weight = layer.weight
    layer.weight = layer.base_layer.weight
    layer.bias = None
    assert layer.base_layer.bias is None
    layer.in_features = 3
    assert layer.base_layer.in_features == 8


def test_settings_of_the_base_module_reach_it():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), settings())
    norm = model.base_model.model[1]
    norm.momentum = 0.25
    assert norm.base_layer.momentum == 0.25
    assert "momentum" not in vars(norm)


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("is_first", [True, False])
def test_what_a_forward_sets_is_reset_by_its_parent(is_first, is_compiled):
    plain = Sequence(is_first)
    model, batch = get_peft_model(copy.deepcopy(plain), settings()), torch.randn(3, 8)
    if is_compiled:
        torch._dynamo.reset()
        model = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(model(batch), plain(batch))


def test_a_switch_of_the_class_and_a_count_of_the_forward_are_set_twice():
    plain = nn.Sequential(Doubled(8, 8))
    model, batch = get_peft_model(copy.deepcopy(plain), settings()), torch.randn(3, 8)
    for is_doubled in (True, False, True):
        for net in (plain, model.base_model.model):
            net[0].is_doubled = is_doubled
            net[0].steps = 0
        torch.testing.assert_close(model(batch), plain(batch))


@pytest.mark.parametrize("name", ["ds_id", "pre_bwd_fn", "whatever"])
def test_what_is_set_on_every_module_is_each_ones_own(name):
    """As DeepSpeed does, children first; its hooks of a layer would act in place of those of the base module."""
    model, _ = moved_pair(Fused)
    for module in reversed([*model.modules()]):
        setattr(module, name, type(module).__name__)
    layer = copy.deepcopy(model).base_model.model.qkv
    assert (vars(layer)[name], vars(layer.base_layer)[name]) == ("SubspaceLayer", "Linear")
    setattr(layer, name, "again")
    assert getattr(layer.base_layer, name) == "Linear"


def test_the_gradient_of_what_was_read_needs_no_entries_of_the_origin():
    """DeepSpeed's ZeRO-3 has them in a module's forward and backward, which may be over."""
    model, _ = moved_pair(Fused)
    expected = torch.autograd.grad(model(x()).sum(), theta_d(model))[0]
    for parameter in model.base_model.model.qkv.base_layer.parameters():
        parameter.ds_id = 0
    out = model(x()).sum()
    for parameter in model.base_model.model.qkv.base_layer.parameters():
        parameter.data = torch.empty(0)
    torch.testing.assert_close(torch.autograd.grad(out, theta_d(model))[0], expected)


def test_without_acting_adapters_the_bases_own_parameter_is_read():
    model, _ = moved_pair(Fused)
    layer = model.base_model.model.qkv
    with model.disable_adapter():
        assert layer.weight is layer.base_layer.weight
    model.merge_adapter()
    assert layer.weight is layer.base_layer.weight


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_transforms_and_traces_see_plain_tensors():
    model, plain = moved_pair(Fused)
    name = next(name for name, p in model.named_parameters() if p is theta_d(model))

    batch = x()

    def output(vector):
        return torch.func.functional_call(model, {name: vector}, (batch,)).sum()

    vector = theta_d(model).detach()
    expected = torch.autograd.grad(model(x()).sum(), theta_d(model))[0]
    torch.testing.assert_close(torch.func.grad(output)(vector), expected)
    torch.testing.assert_close(torch.func.jacfwd(output)(vector), expected)
    traced = torch.jit.trace(model.eval(), (x(),), check_trace=False)
    torch.testing.assert_close(traced(x()), plain(x()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", MODELS[:-1], ids=lambda kind: kind.__name__)
def test_compiled_models_read_without_a_break_of_the_graph(kind):
    model, plain = moved_pair(kind)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    out = compiled(x())
    torch.testing.assert_close(out, plain(x()), rtol=1e-6, atol=1e-6)
    expected = torch.autograd.grad(model(x()).sum(), theta_d(model))[0]
    torch.testing.assert_close(torch.autograd.grad(out.sum(), theta_d(model))[0], expected, rtol=1e-6, atol=1e-6)


def test_checkpointed_activations_are_recomputed_with_what_was_read():
    model, _ = moved_pair(Looped)
    expected = torch.autograd.grad(model(x()).sum(), theta_d(model))[0]
    for use_reentrant in (False, True):
        out = torch.utils.checkpoint.checkpoint(model, x().requires_grad_(), use_reentrant=use_reentrant)
        theta_d(model).grad = None
        out.sum().backward()
        torch.testing.assert_close(theta_d(model).grad, expected)
