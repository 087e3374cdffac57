"""LeNet with less or more of what makes it a convolutional network (Li et al. 2018, Gargiulo 2023).

Of its convolutions the Untied LeNet keeps the small windows, FC-Tied-LeNet the tied weights, FC-LeNet neither. The
maximum over a window is taken before ReLU, with which it commutes, and in the layout where it is fast.
"""

from torch import nn

from recipes.tasks.networks.layers import ChannelsLast, LocallyConnected2d, MaximalConv2d
from recipes.tasks.networks.plain import Shape, lenet_head, lenet_kernel, pooled


def untied_lenet(shape: Shape, classes: int) -> nn.Module:
    """LeNet whose two convolutions are locally connected, with biases untied too."""
    side, layers = shape[1], []
    kernel, padding = lenet_kernel(side)
    for n, m in ((shape[0], 6), (6, 16)):
        layers += [LocallyConnected2d(n, m, side, kernel, padding), nn.MaxPool2d(2), nn.ReLU()]
        side = pooled(side, kernel, padding)
    return nn.Sequential(*layers, *lenet_head(16 * side * side, classes))


def fc_lenet(shape: Shape, classes: int) -> nn.Module:
    """LeNet whose two convolutions are fully connected layers with as many outputs."""
    side, layers = shape[1], []
    kernel, padding = lenet_kernel(side)
    for n, m in ((shape[0], 6), (6, 16)):
        out = side + 2 * padding - kernel + 1
        layers += [nn.Flatten(), nn.Linear(n * side * side, m * out * out), nn.Unflatten(1, (m, out, out))]
        layers += [ChannelsLast(), nn.MaxPool2d(2), nn.ReLU()]
        side = out // 2
    return nn.Sequential(*layers, *lenet_head(16 * side * side, classes))


def fc_tied_lenet(shape: Shape, classes: int) -> nn.Module:
    """LeNet whose kernels cover the image: of side 2 H - 1, H - 1 and H / 4 for images of side H.

    The last, 16 to 120 channels on as many pixels as it has, is the linear layer of the head.
    """
    side, layers = shape[1], []
    for n, m in ((shape[0], 6), (6, 16)):
        layers += [MaximalConv2d(n, m, side), ChannelsLast(), nn.MaxPool2d(2), nn.ReLU()]
        side //= 2
    return nn.Sequential(*layers, *lenet_head(16 * side * side, classes))
