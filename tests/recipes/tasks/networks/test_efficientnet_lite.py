"""EfficientNet-Lite0 against what TensorFlow says of its padding, and by its count of parameters."""

import pytest
import torch
from torch import nn

from recipes.tasks.networks.efficientnet_lite import EfficientNetLite0, renamed, same


def test_it_has_the_published_number_of_parameters_and_names_of_its_own():
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
def test_padding_is_tensorflows(side, kernel, stride, before):
    conv = nn.Conv2d(1, 1, kernel, stride, bias=False)
    x = torch.randn(2, 1, side, side)
    outputs = -(-side // stride)
    whole = torch.zeros(2, 1, side + 2 * kernel, side + 2 * kernel)
    whole[:, :, before : before + side, before : before + side] = x
    expected = nn.functional.conv2d(whole, conv.weight, stride=stride)[:, :, :outputs, :outputs]
    torch.testing.assert_close(same(x, conv), expected)


def test_weights_of_other_names_are_taken_by_their_order():
    model, other = EfficientNetLite0(), EfficientNetLite0()
    weights = {f"_{at}": value for at, value in enumerate(other.state_dict().values())}
    model.load_state_dict(renamed(weights, model))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(x), other.eval()(x))
    weights.pop("_3")
    with pytest.raises(ValueError, match="must be those of EfficientNetLite0, 296 tensors .*; got 295, which begin"):
        renamed(weights, model)
