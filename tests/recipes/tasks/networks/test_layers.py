import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import conv2d, linear, pad

from recipes.tasks.models import build
from recipes.tasks.networks.efficientnet_lite import EfficientNetLite0, renamed, same
from recipes.tasks.networks.layers import ChannelsLast, LocallyConnected2d, MaximalConv2d
from subspace_peft import SubspaceConfig


SIZES = {"c_in": st.integers(1, 3), "c_out": st.integers(1, 4), "side": st.integers(3, 7)}


def randomized(layer: nn.Module) -> nn.Module:
    for p in layer.double().parameters():
        nn.init.normal_(p)
    return layer


def gradients(y, layer, x):
    """Of a sum of the outputs with unequal weights, by weight, bias and input."""
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    return torch.autograd.grad((weights * y).sum(), [layer.weight, layer.bias, x])


@settings(max_examples=25)
@given(**SIZES, kernel=st.integers(1, 3), padding=st.integers(0, 2))
def test_each_position_is_a_linear_layer_of_its_window(c_in, c_out, side, kernel, padding):
    layer = randomized(LocallyConnected2d(c_in, c_out, side, kernel, padding))
    x = torch.randn(2, c_in, side, side, dtype=torch.float64)
    padded, y = pad(x, [padding] * 4), layer(x)
    out = side + 2 * padding - kernel + 1
    assert y.shape == (2, c_out, out, out)
    for p in range(out**2):
        i, j = divmod(p, out)
        window = padded[:, :, i : i + kernel, j : j + kernel].flatten(1)
        torch.testing.assert_close(y[:, :, i, j], linear(window, layer.weight[p], layer.bias[p]))


@pytest.mark.parametrize(("kernel", "padding"), [(5, 0), (3, 1)])
def test_untied_weights_that_are_equal_are_a_convolution(kernel, padding):
    layer, x = LocallyConnected2d(3, 4, 8, kernel, padding).double(), torch.randn(5, 3, 8, 8, dtype=torch.float64)
    conv = nn.Conv2d(3, 4, kernel, padding=padding).double()
    with torch.no_grad():
        layer.weight.copy_(conv.weight.flatten(1).expand_as(layer.weight))
        layer.bias.copy_(conv.bias.expand_as(layer.bias))
    x.requires_grad_()
    untied, tied = (gradients(module(x), module, x) for module in (layer, conv))
    torch.testing.assert_close(layer(x), conv(x))
    torch.testing.assert_close(untied[0].sum(0), tied[0].flatten(1))
    torch.testing.assert_close(untied[1].sum(0), tied[1])
    torch.testing.assert_close(untied[2], tied[2])


def test_locally_connected_layers_keep_the_scale_of_their_inputs():
    torch.manual_seed(0)
    x, width = torch.randn(64, 1, 28, 28), 1
    for _ in range(3):
        layer = LocallyConnected2d(width, 16, x.shape[-1], 5)
        y = layer(x)
        assert y.std().item() == pytest.approx(2**0.5, rel=0.15)  # He et al. 2015: variance 2 before ReLU, 1 after it
        x, width = y.relu(), 16


def test_activations_of_the_untied_lenet_are_of_order_one_at_the_start():
    x = torch.rand(64, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    for layer in build("untied_lenet", "mnist"):
        x = layer(x)
        if isinstance(layer, LocallyConnected2d):
            assert 0.5 < x.std() < 2


@settings(max_examples=25)
@given(**SIZES)
def test_the_maximal_convolution_is_a_convolution(c_in, c_out, side):
    layer = randomized(MaximalConv2d(c_in, c_out, side))
    x = torch.randn(2, c_in, side, side, dtype=torch.float64, requires_grad=True)
    y, expected = layer(x), conv2d(x, layer.weight, layer.bias, padding=side - 1)
    torch.testing.assert_close(y, expected)
    for ours, exact in zip(gradients(y, layer, x), gradients(expected, layer, x), strict=True):
        torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize(
    "layer", [LocallyConnected2d(1, 4, 8, 3), MaximalConv2d(1, 4, 8)], ids=lambda m: type(m).__name__
)
def test_new_layers_are_vectorised_over_runs(layer):
    runs = {name: p.detach() * torch.tensor([1.0, 2.0]).view(2, *[1] * p.ndim) for name, p in layer.named_parameters()}
    x = torch.rand(2, 3, 1, 8, 8)

    def loss(parameters, x):
        return functional_call(layer, parameters, (x,)).square().sum()

    together = vmap(grad(loss))(runs, x)
    for run in range(2):
        alone = grad(loss)({name: p[run] for name, p in runs.items()}, x[run])
        for name in alone:
            torch.testing.assert_close(together[name][run], alone[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("layer", "sizes", "features"), [(LocallyConnected2d, (1, 4, 8, 3), 144), (MaximalConv2d, (1, 4, 8), 256)]
)
def test_new_layers_carry_an_adapter(layer, sizes, features, tmp_path):
    def network():
        torch.manual_seed(0)
        return nn.Sequential(layer(*sizes), nn.Flatten(), nn.Linear(features, 3))

    x, before = torch.rand(2, 1, 8, 8), network()
    model = get_peft_model(network(), SubspaceConfig(d=5, projection="fastfood", target_modules="all"))
    assert torch.equal(model(x), before(x))
    (theta_d,) = (p for p in model.parameters() if p.requires_grad)
    model(x).square().sum().backward()
    assert theta_d.grad.all()
    nn.init.ones_(theta_d)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(network(), tmp_path)
    assert torch.equal(loaded(x), model(x))
    assert not torch.allclose(loaded(x), before(x))
    torch.testing.assert_close(loaded.merge_and_unload()(x), model(x))


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_last_is_a_layout(channels):
    x = torch.rand(2, channels, 4, 4)
    y = ChannelsLast()(x)
    assert torch.equal(x, y)
    assert y.stride() == (16 * channels, 1, 4 * channels, channels)


def test_efficientnet_lite_has_the_published_number_of_parameters_and_names_of_its_own():
    model = EfficientNetLite0()
    assert sum(p.numel() for p in model.parameters()) == 4_652_008
    names = list(model.state_dict())
    assert names[:2] == ["conv_stem.weight", "bn1.weight"]
    assert {"blocks.0.0.conv_pw.weight", "blocks.6.0.conv_pwl.weight", "bn2.running_var"} <= set(names)


@pytest.mark.parametrize(
    ("side", "kernel", "stride", "before"),
    # "SAME": ceil(side / stride) outputs, the smaller half of the padding before the image
    [(8, 3, 1, 1), (8, 3, 2, 0), (9, 3, 2, 1), (8, 5, 2, 1), (9, 5, 2, 2), (1, 5, 2, 2)],
)
def test_its_padding_is_tensorflows(side, kernel, stride, before):
    conv = nn.Conv2d(1, 1, kernel, stride, bias=False)
    x = torch.randn(2, 1, side, side)
    outputs = -(-side // stride)
    whole = torch.zeros(2, 1, side + 2 * kernel, side + 2 * kernel)
    whole[:, :, before : before + side, before : before + side] = x
    expected = nn.functional.conv2d(whole, conv.weight, stride=stride)[:, :, :outputs, :outputs]
    torch.testing.assert_close(same(x, conv), expected)


def test_its_weights_of_other_names_are_taken_by_their_order():
    model, other = EfficientNetLite0(), EfficientNetLite0()
    weights = {f"_{at}": value for at, value in enumerate(other.state_dict().values())}
    model.load_state_dict(renamed(weights, model))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(x), other.eval()(x))
    weights.pop("_3")
    with pytest.raises(ValueError, match="must be those of EfficientNetLite0, 296 tensors .*; got 295, which begin"):
        renamed(weights, model)
