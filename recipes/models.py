"""The networks of the recipes, by name and data set, with the parameter counts of the papers.

                 digits 8x8    mnist, fashion_mnist 28x28    cifar10 32x32
    fc                3 466                       199 210        1 051 930
    lenet            19 754                        44 426           62 006

Li et al. 2018 and Gargiulo 2023; ReLU after every layer but the last, torch's default initialisation.
"""

from itertools import pairwise

import torch
from torch import nn


SHAPES = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "fashion_mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
CLASSES = 10


def fc(dataset: str) -> nn.Module:
    """Fully connected: 64-32-32-10, 784-200-200-10 (Li et al. 2018), 3072-270-270-270-270-10 (Gargiulo 2023)."""
    channels, height, width = SHAPES[dataset]
    hidden = {"digits": [32] * 2, "cifar10": [270] * 4}.get(dataset, [200] * 2)
    layers = [nn.Flatten()]
    for n, m in pairwise([channels * height * width, *hidden]):
        layers += [nn.Linear(n, m), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden[-1], CLASSES))


def lenet(dataset: str) -> nn.Module:
    """LeNet: two 5x5 convolutions without padding, each pooled by 2, then 120-84-10.

    On the 8x8 digits, too small for that, the convolutions are 3x3 with padding 1.
    """
    channels, height, _ = SHAPES[dataset]
    kernel, padding = (3, 1) if dataset == "digits" else (5, 0)
    side = height
    for _ in range(2):
        side = (side + 2 * padding - kernel + 1) // 2
    return nn.Sequential(
        nn.Conv2d(channels, 6, kernel, padding=padding), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, kernel, padding=padding), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * side * side, 120), nn.ReLU(),
        nn.Linear(120, 84), nn.ReLU(),
        nn.Linear(84, CLASSES),
    )  # fmt: skip


MODELS = {"fc": fc, "lenet": lenet}


def build(name: str, dataset: str, seed: int = 0) -> nn.Module:
    """The network `name` for `dataset`, drawn from `seed` alone."""
    for key, value, table in (("model", name, MODELS), ("dataset", dataset, SHAPES)):
        if value not in table:
            raise ValueError(f"`{key}` must be one of {', '.join(table)}, got {value!r}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name](dataset)
