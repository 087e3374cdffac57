"""Residual networks (He et al. 2016), in the forms that the papers of the recipes train.

Each is made for images of `shape` (channels, height, width), squares, and `classes`.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn.functional import pad

from recipes.tasks.networks.layers import ChannelsLast
from recipes.tasks.networks.plain import Shape, lecun_normal


class Residual(nn.Module):
    """relu(body(x) + shortcut(x)), or without the last relu."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None, relu: bool = True):
        super().__init__()
        self.body, self.shortcut = body, shortcut or nn.Identity()
        self.activation = nn.ReLU() if relu else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.body(x) + self.shortcut(x))


class Widen(nn.Module):
    """The shortcut without parameters of He et al. 2016, option A: every second pixel, new channels zero."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.channels // 2, self.channels - self.channels // 2))


class Scale(nn.Module):
    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


Norm = Callable[[int], nn.Module]


def _conv(n: int, m: int, stride: int = 1, kernel: int = 3, norm: Norm = nn.BatchNorm2d) -> list[nn.Module]:
    return [nn.Conv2d(n, m, kernel, stride, padding=kernel // 2, bias=False), norm(m)]


def _stages(
    shape: Shape,
    classes: int,
    blocks: int,
    shortcut: Callable[[int, int], nn.Module],
    norm: Norm = nn.BatchNorm2d,
) -> nn.Sequential:
    """6 blocks + 2 layers: stages of 16, 32, 64 channels, `shortcut(n, m)` from one to the next; the mean; a head."""
    layers, width = [*_conv(shape[0], 16, norm=norm), nn.ReLU()], 16
    for channels in (16, 32, 64):
        for _ in range(blocks):
            wider = channels != width
            body = nn.Sequential(
                *_conv(width, channels, 2 if wider else 1, norm=norm), nn.ReLU(), *_conv(channels, channels, norm=norm)
            )
            layers.append(Residual(body, shortcut(width, channels) if wider else None))
            width = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def resnet_dldr(shape: Shape, classes: int, blocks: int) -> nn.Module:
    """ResNet8, 20 and 32 of Li et al. 2021 (DLDR): shortcuts without parameters, Kaiming-normal weights."""
    network = _stages(shape, classes, blocks, lambda n, m: Widen(m - n))
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
    return network


def resnet(shape: Shape, classes: int) -> nn.Module:
    """The ResNet of Gargiulo 2023: ResNet20 whose two shortcuts are 3x3 convolutions of stride 2, batch-normalised."""
    return nn.Sequential(ChannelsLast(), *_stages(shape, classes, 3, lambda n, m: nn.Sequential(*_conv(n, m, 2))))


def resnet20v1(shape: Shape, classes: int) -> nn.Module:
    """ResNet20v1 of Larsen et al. 2021: the two shortcuts are 1x1 convolutions of stride 2, batch-normalised.

    Batch norm "on the fly" (appendix A.4): by the statistics of the batch at hand, in evaluation too, so evaluate in
    large batches. Initialised as in flax. The mean before the head is over all pixels; the paper's code takes the
    first 7x7, on CIFAR of 8x8.
    """
    norm = partial(nn.BatchNorm2d, track_running_stats=False)
    layers = _stages(shape, classes, 3, lambda n, m: nn.Sequential(*_conv(n, m, 2, 1, norm)), norm)
    return lecun_normal(nn.Sequential(ChannelsLast(), *layers))


def resnet9(shape: Shape, classes: int) -> nn.Module:
    """The ResNet9 of Tuddenham et al.: no biases, two residual blocks, logits times 1/16."""

    def conv(n: int, m: int, *after: nn.Module) -> nn.Module:
        return nn.Sequential(*_conv(n, m), nn.ReLU(), *after)

    def residual(n: int) -> nn.Module:
        return Residual(nn.Sequential(conv(n, n), conv(n, n)), relu=False)

    pool = partial(nn.MaxPool2d, 2)
    return nn.Sequential(
        conv(shape[0], 64),
        conv(64, 128, pool()), residual(128),
        conv(128, 256, pool()),
        conv(256, 512, pool()), residual(512),
        nn.AdaptiveMaxPool2d(1), nn.Flatten(),
        nn.Linear(512, classes, bias=False), Scale(1 / 16),
    )  # fmt: skip
