"""Networks without shortcuts: fully connected, LeNet and other small convolutional ones.

Each is made for images of `shape` (channels, height, width), squares, and `classes`.
"""

from itertools import pairwise

from torch import nn

from recipes.tasks.networks.layers import ChannelsLast


Shape = tuple[int, int, int]


def fc(shape: Shape, classes: int) -> nn.Module:
    """Fully connected: 64-32-32-10, 784-200-200-10 (Li et al. 2018), 3072-270-270-270-270-10 (Gargiulo 2023)."""
    channels, height, width = shape
    hidden = {8: [32] * 2, 32: [270] * 4}.get(height, [200] * 2)
    layers = [nn.Flatten()]
    for n, m in pairwise([channels * height * width, *hidden]):
        layers += [nn.Linear(n, m), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden[-1], classes))


def mlp(shape: Shape, classes: int) -> nn.Module:
    """784-2000-2000-10 without biases; smaller images are resized to 28x28, so that one network serves them all."""
    channels, height, width = shape
    resized = [nn.Upsample(size=28, mode="bilinear")] if height < 28 else []
    return nn.Sequential(
        *resized, nn.Flatten(),
        nn.Linear(channels * max(height, 28) * max(width, 28), 2000, bias=False), nn.ReLU(),
        nn.Linear(2000, 2000, bias=False), nn.ReLU(),
        nn.Linear(2000, classes, bias=False),
    )  # fmt: skip


def lenet(shape: Shape, classes: int, first_padding: int = 0) -> nn.Module:
    """LeNet: two 5x5 convolutions without padding, each pooled by 2, then 120-84-10. LeNet-5 pads the first by 2."""
    channels, height, _ = shape
    kernel, padding = lenet_kernel(height)
    first = padding or first_padding
    side = pooled(pooled(height, kernel, first), kernel, padding)
    return nn.Sequential(
        nn.Conv2d(channels, 6, kernel, padding=first), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, kernel, padding=padding), nn.ReLU(), nn.MaxPool2d(2),
        *lenet_head(16 * side * side, classes),
    )  # fmt: skip


def lenet_kernel(height: int) -> tuple[int, int]:
    """Side and padding of LeNet's kernels; the 8x8 digits are too small for 5x5 without padding."""
    return (3, 1) if height == 8 else (5, 0)


def pooled(side: int, kernel: int, padding: int) -> int:
    """The side of an image after a convolution, pooled by 2."""
    return (side + 2 * padding - kernel + 1) // 2


def lenet_head(features: int, classes: int) -> list[nn.Module]:
    return [
        nn.Flatten(),
        nn.Linear(features, 120), nn.ReLU(),
        nn.Linear(120, 84), nn.ReLU(),
        nn.Linear(84, classes),
    ]  # fmt: skip


def cnn(shape: Shape, classes: int) -> nn.Module:
    """The small network of Tuddenham et al.: LeNet's two convolutions, of 1 and 2 channels, and a head."""
    channels, height, _ = shape
    kernel, padding = lenet_kernel(height)
    side = pooled(pooled(height, kernel, padding), kernel, padding)
    return nn.Sequential(
        nn.Conv2d(channels, 1, kernel, padding=padding), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(1, 2, kernel, padding=padding), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(2 * side * side, classes),
    )  # fmt: skip


def conv(shape: Shape, classes: int, widths: tuple[int, ...], average: bool = False) -> nn.Module:
    """Conv-2 and Conv-3 of Larsen et al. 2021: 3x3 convolutions of these widths, each pooled by 2, and a head.

    Pooled by the maximum, as the paper says; `average` as its code does. Initialised as there, see `lecun_normal`.
    """
    channels, height, _ = shape
    layers = [ChannelsLast()]  # twice as fast as the usual layout, where pooling is slow
    for n, m in pairwise([channels, *widths]):
        layers.append(nn.Conv2d(n, m, 3, padding=1))
        # The maximum and ReLU commute, and ReLU of the pooled image is less work. The average does not commute.
        layers += [nn.ReLU(), nn.AvgPool2d(2)] if average else [nn.MaxPool2d(2), nn.ReLU()]
    side = height // 2 ** len(widths)
    return lecun_normal(nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * side * side, classes)))


def lecun_normal(network: nn.Module) -> nn.Module:
    """The network with weights of variance 1 / fan-in, of a normal cut at two deviations; biases 0, as in flax."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            cut = 0.87962566103423978  # the deviation of a standard normal cut at -2 and 2
            std = module.weight[0].numel() ** -0.5 / cut
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network
