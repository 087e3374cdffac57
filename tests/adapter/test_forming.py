"""Forming: no moved tensor is held for the backward pass, and gradients are those of a plain model that holds them."""

import copy
import gc
import weakref

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from subspace_peft import SubspaceConfig
from subspace_peft.adapter import forming
from tests.cases import move, theta_d


SIDE = 160  # a weight then has 25 600 entries, more than are held
PROJECTIONS = ("fastfood", "fastjl", "sparse", "dense", "kronecker", "basis", "coordinate", "identity")

pytestmark = pytest.mark.skipif(forming.OUTER_HOOKS is None, reason="torch before 2.8 does not name the hooks")


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(SIDE, 2, batch_first=True)

    def forward(self, x):
        return self.inner(x, x, x, need_weights=False)[0]


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, SIDE, SIDE) / SIDE**0.5)

    def forward(self, x):
        return sum(F.linear(x, expert) for expert in self.stack)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.LSTM(SIDE, SIDE // 4, batch_first=True)

    def forward(self, x):
        return self.inner(x)[0]


class Images(nn.Module):
    def __init__(self, convolution):
        super().__init__()
        self.inner = convolution

    def forward(self, x):
        return self.inner(x.view(len(x), 64, 10, 16))


KINDS = {
    "linear": lambda: nn.Linear(SIDE, SIDE),
    "conv1d of transformers": lambda: Conv1D(SIDE, SIDE),
    "convolution": lambda: Images(nn.Conv2d(64, 48, 3)),
    "transposed convolution": lambda: Images(nn.ConvTranspose2d(64, 48, 3)),
    "normalisation": lambda: nn.LayerNorm([64, SIDE]),
    "attention": Attention,
    "experts": Experts,
    "recurrent": Recurrent,
}


def base_of(kind):
    """A module between two that train, so that its input needs a gradient."""
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(SIDE), KINDS[kind]())


def inputs():
    return torch.randn(2, 64, SIDE, generator=torch.Generator().manual_seed(1), requires_grad=True)


def wrapped(base, projection="fastjl", **settings):
    targets = [name for name, module in base.named_modules() if name and list(module.parameters(recurse=False))]
    settings = {"d": 20, "projection": projection, "target_modules": [t for t in targets if t != "0"], **settings}
    D = sum(p.numel() for name, p in base.named_parameters() if not name.startswith("0."))
    if projection == "basis":
        settings["basis"] = torch.linalg.qr(torch.randn(D, 20, generator=torch.Generator().manual_seed(2)))[0]
    elif projection in ("coordinate", "identity"):
        settings["d"] = None
        if projection == "coordinate":
            settings["mask"] = torch.rand(D, generator=torch.Generator().manual_seed(2)) < 0.3
    model = get_peft_model(base, SubspaceConfig(**settings))
    move(model, size=0.01)
    return model


def plain_copy(model, base):
    """The base with moved tensors of its own, which know nothing of an adapter."""
    twin = copy.deepcopy(base).requires_grad_(False)
    for name, module in model.base_model.model.named_modules():
        for path, moved in (module.moved(["default"]) if hasattr(module, "coordinates") else {}).items():
            twin.get_submodule(name.replace(".base_layer", ""))._parameters[path] = nn.Parameter(
                moved.detach().clone()
            )
    return twin


@pytest.fixture
def formed_tensors(monkeypatch):
    """Weak references to the large tensors that are formed."""
    references, form = [], forming.Form.__call__

    def call(self):
        tensor = form(self)
        if tensor.numel() > forming.HELD_ENTRIES:
            references.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(forming.Form, "__call__", call)
    return references


def saved_sizes(run):
    """The entries of each tensor that is saved for the backward pass of a call, and the output of the call."""
    sizes = []

    def pack(tensor):
        sizes.append(tensor.untyped_storage().nbytes() // tensor.itemsize)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    return sizes, output


def assert_holds_nothing(model, x, references):
    y = model(x)
    assert len(references) >= 1
    assert not [reference().shape for reference in references if reference() is not None]
    return y


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_a_plain_model_and_nothing_formed_is_held(kind, formed_tensors):
    base = base_of(kind)
    model = wrapped(copy.deepcopy(base))
    plain, x, other = plain_copy(model, base), inputs(), inputs()
    formed_tensors.clear()
    y, expected = assert_holds_nothing(model, x, formed_tensors), plain(other)
    torch.testing.assert_close(y, expected)
    probe = torch.randn(y.shape)
    (y * probe).sum().backward()
    (expected * probe).sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
    to_theta_d = torch.zeros_like(theta_d(model))
    for name, module in model.base_model.model.named_modules():
        for path, coordinates in getattr(module, "coordinates", {}).get("default", {}).items():
            moved = getattr(plain.get_submodule(name.replace(".base_layer", "")), path)
            to_theta_d += coordinates.projections[""].transpose(moved.grad.flatten())
    scale = model.base_model.model.subspace_vectors.scales["default"]
    torch.testing.assert_close(theta_d(model).grad, to_theta_d * scale, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_projection_holds_a_formed_tensor(projection, dtype, formed_tensors):
    for kind in ("convolution", "linear"):
        model = wrapped(base_of(kind).to(dtype), projection)
        formed_tensors.clear()
        if kind == "convolution" or projection != "kronecker":  # which forms no weight of a Linear
            y = assert_holds_nothing(model, inputs().to(dtype), formed_tensors)
            y.float().sum().backward()
            assert theta_d(model).grad.isfinite().all()


def test_autocast_holds_no_copy_of_a_formed_tensor():
    model, x = wrapped(base_of("linear")), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        sizes, y = saved_sizes(lambda: model(x))
    assert SIDE * SIDE not in sizes
    expected = theta_d(model)
    y.float().sum().backward()
    assert expected.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["linear", "convolution", "recurrent"])
def test_a_change_between_forward_and_backward(kind):
    """The gradient is that of before, whatever is set or switched; what is written to in place is an error."""
    model, x = wrapped(base_of(kind)), inputs()
    model(x).square().sum().backward()
    expected = theta_d(model).grad.clone(), x.grad.clone()
    theta_d(model).grad = x.grad = None
    loss = model(x).square().sum()
    with torch.no_grad():
        theta_d(model).mul_(2)
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 3.0)
    model.delete_adapter("default") if kind == "convolution" else model.merge_adapter()
    vector = next(p for n, p in model.named_parameters() if "theta_d" in n) if kind != "convolution" else None
    loss.backward()
    if vector is not None:
        torch.testing.assert_close(vector.grad, expected[0])
    torch.testing.assert_close(x.grad, expected[1])


def test_a_base_written_to_between_forward_and_backward_is_an_error():
    model, x = wrapped(base_of("linear")), inputs()
    loss = model(x).square().sum()
    with torch.no_grad():
        model.base_model.model[1].base_layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_input_written_to_between_forward_and_backward_is_an_error():
    model, x = wrapped(base_of("convolution")), inputs()
    hidden = model.base_model.model[0](x)
    loss = model.base_model.model[1](hidden).square().sum()
    with torch.no_grad():
        hidden.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("kind", ["linear", "conv1d of transformers", "convolution"])
def test_second_derivatives(kind):
    base = base_of(kind)
    model = wrapped(copy.deepcopy(base))
    plain = plain_copy(model, base)
    seconds = []
    for each in (model, plain):
        x = inputs()
        (grad,) = torch.autograd.grad(each(x).square().sum(), x, create_graph=True)
        seconds.append(torch.autograd.grad(grad.square().sum(), x)[0])
    torch.testing.assert_close(*seconds, rtol=1e-4, atol=1e-4)
    x = inputs()
    (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    (mixed,) = torch.autograd.grad(grad.sum(), theta_d(model))
    assert mixed.abs().max() > 0


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_checkpoints_around_a_layer_still_hold_its_inputs_alone(kind):
    model = wrapped(base_of(kind))
    x, other = inputs(), inputs()
    model(other).square().sum().backward()
    expected = theta_d(model).grad.clone()
    theta_d(model).grad = None
    hidden = []
    model.base_model.model[0].register_forward_hook(lambda module, args, output: hidden.append(weakref.ref(output)))
    y = checkpoint(model, x, use_reentrant=False)
    assert len(hidden) == 1
    assert hidden[0]() is None
    y.square().sum().backward()
    torch.testing.assert_close(theta_d(model).grad, expected)
    torch.testing.assert_close(x.grad, other.grad)


def test_a_recurrent_network_forms_its_weights_once_a_backward_pass(formed_tensors):
    model = wrapped(base_of("recurrent"))
    y = model(inputs())
    formed_tensors.clear()
    y.sum().backward()
    assert len(formed_tensors) <= 4  # of the two weights, one is small; 64 steps
    assert forming._last == [None]
    gc.collect()
    assert not [reference for reference in formed_tensors if reference() is not None]


@pytest.mark.parametrize("kind", ["linear", "conv1d of transformers"])
def test_an_output_can_be_written_to_in_place(kind):
    model = wrapped(base_of(kind))
    y = model(inputs()).permute(0, 2, 1)
    y += 1
    y.sum().backward()
    assert theta_d(model).grad.isfinite().all()


def test_where_hooks_of_saved_tensors_are_disabled_tensors_are_held(formed_tensors):
    model = wrapped(base_of("linear"))
    x = inputs()
    expected = torch.autograd.grad(model(x).sum(), theta_d(model))[0]
    formed_tensors.clear()
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        y = model(x)
    assert [reference for reference in formed_tensors if reference() is not None]
    torch.testing.assert_close(torch.autograd.grad(y.sum(), theta_d(model))[0], expected)


def test_what_a_node_has_saved_can_be_looked_at():
    model = wrapped(base_of("experts"))
    node = model(inputs()).grad_fn
    while not hasattr(node, "_saved_mat2"):
        node = next(following for following, _ in node.next_functions if following is not None)
    assert node._saved_mat2.shape == (SIDE, SIDE)
    assert forming._last == [None]
