"""EfficientNet-Lite0 (Tan and Le 2019, with ReLU6 and no squeeze-and-excitation), its parts named as timm names them.

4 652 008 parameters with 1 000 classes. Convolutions are padded as TensorFlow's "SAME".
"""

from functools import partial

from torch import Tensor, nn
from torch.nn.functional import pad, relu6


STAGES = (
    # blocks, kernel, stride, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM, FEATURES = 32, 1280
BatchNorm = partial(nn.BatchNorm2d, eps=1e-3)


def same(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """The convolution of x padded to ceil(side / stride) outputs, the odd pixel to the right and below."""
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    totals = [max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[:1:-1]]
    return conv(pad(x, [part for total in totals for part in (total // 2, total - total // 2)]))


class Separable(nn.Module):
    """A depthwise convolution and a pointwise one; the first block has no expansion."""

    def __init__(self, channels: int, kernel: int, stride: int, out: int):
        super().__init__()
        self.conv_dw = nn.Conv2d(channels, channels, kernel, stride, groups=channels, bias=False)
        self.bn1 = BatchNorm(channels)
        self.conv_pw = nn.Conv2d(channels, out, 1, bias=False)
        self.bn2 = BatchNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        x = relu6(self.bn1(same(x, self.conv_dw)))
        return self.bn2(self.conv_pw(x))


class Inverted(nn.Module):
    """Expansion, depthwise convolution, pointwise one; with x added where the shape stays."""

    def __init__(self, channels: int, kernel: int, stride: int, expansion: int, out: int):
        super().__init__()
        wide = expansion * channels
        self.conv_pw = nn.Conv2d(channels, wide, 1, bias=False)
        self.bn1 = BatchNorm(wide)
        self.conv_dw = nn.Conv2d(wide, wide, kernel, stride, groups=wide, bias=False)
        self.bn2 = BatchNorm(wide)
        self.conv_pwl = nn.Conv2d(wide, out, 1, bias=False)
        self.bn3 = BatchNorm(out)
        self.stays = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        y = relu6(self.bn1(self.conv_pw(x)))
        y = relu6(self.bn2(same(y, self.conv_dw)))
        y = self.bn3(self.conv_pwl(y))
        return x + y if self.stays else y


class EfficientNetLite0(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] to logits [B, classes]."""

    def __init__(self, classes: int = 1000):
        super().__init__()
        self.conv_stem = nn.Conv2d(3, STEM, 3, 2, bias=False)
        self.bn1 = BatchNorm(STEM)
        self.blocks, channels = nn.Sequential(), STEM
        for blocks, kernel, stride, expansion, out in STAGES:
            stage = nn.Sequential()
            for at in range(blocks):
                step = stride if at == 0 else 1
                if expansion == 1:
                    stage.append(Separable(channels, kernel, step, out))
                else:
                    stage.append(Inverted(channels, kernel, step, expansion, out))
                channels = out
            self.blocks.append(stage)
        self.conv_head = nn.Conv2d(channels, FEATURES, 1, bias=False)
        self.bn2 = BatchNorm(FEATURES)
        self.classifier = nn.Linear(FEATURES, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = relu6(self.bn1(same(x, self.conv_stem)))
        x = relu6(self.bn2(self.conv_head(self.blocks(x))))
        return self.classifier(x.mean((2, 3)))


def renamed(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The weights under the names of the model: other implementations have the same tensors in the same order.

    Raises:
        ValueError: if they do not.
    """
    wanted = model.state_dict()
    if weights.keys() == wanted.keys():
        return weights
    shapes = [value.shape for value in weights.values()]
    if shapes != [value.shape for value in wanted.values()]:
        raise ValueError(
            f"The weights must be those of {type(model).__name__}, {len(wanted)} tensors of its shapes in its order; "
            f"got {len(shapes)}, which begin with {', '.join(list(weights)[:3])}."
        )
    return dict(zip(wanted, weights.values(), strict=True))
