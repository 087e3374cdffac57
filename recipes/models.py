"""The networks of the recipes, by name and data set, with the parameter counts of the papers.

                 digits 8x8    mnist, fashion_mnist 28x28    cifar10 32x32    cifar100 32x32
    fc                3 466                       199 210        1 051 930         1 076 320
    lenet            19 754                        44 426           62 006            69 656
    lenet5           19 754                        61 706           83 126            90 776
    cnn                 120                           408              638             5 228
    resnet8          75 002                        75 002           75 290            81 140
    resnet20        269 434                       269 434          269 722           275 572
    resnet32        463 866                       463 866          464 154           470 004
    resnet9       6 571 968                     6 571 968        6 573 120         6 619 200
    conv2             6 090                        20 490           25 578           209 988
    conv3            56 394                        61 514           66 570           158 820

fc, lenet: Li et al. 2018 and Gargiulo 2023. lenet5, resnet: Li et al. 2021 (DLDR). cnn, resnet9: Tuddenham et al.
2020. conv2, conv3: Larsen et al. 2021. ReLU after every layer but the last; torch's default initialisation where
nothing else is said.
"""

import difflib
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import pad


SHAPES = {
    "digits": (1, 8, 8),
    "mnist": (1, 28, 28),
    "fashion_mnist": (1, 28, 28),
    "cifar10": (3, 32, 32),
    "cifar100": (3, 32, 32),
}
CLASSES = dict.fromkeys(SHAPES, 10) | {"cifar100": 100}


def fc(dataset: str) -> nn.Module:
    """Fully connected: 64-32-32-10, 784-200-200-10 (Li et al. 2018), 3072-270-270-270-270-10 (Gargiulo 2023)."""
    channels, height, width = SHAPES[dataset]
    hidden = {"digits": [32] * 2, "cifar10": [270] * 4, "cifar100": [270] * 4}.get(dataset, [200] * 2)
    layers = [nn.Flatten()]
    for n, m in pairwise([channels * height * width, *hidden]):
        layers += [nn.Linear(n, m), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden[-1], CLASSES[dataset]))


def lenet(dataset: str, first_padding: int = 0) -> nn.Module:
    """LeNet: two 5x5 convolutions without padding, each pooled by 2, then 120-84-10.

    On the 8x8 digits, too small for that, the convolutions are 3x3 with padding 1. LeNet-5 pads the first by 2.
    """
    channels, height, _ = SHAPES[dataset]
    kernel, paddings = (3, (1, 1)) if dataset == "digits" else (5, (first_padding, 0))
    side = _pooled(height, kernel, *paddings)
    return nn.Sequential(
        nn.Conv2d(channels, 6, kernel, padding=paddings[0]), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, kernel, padding=paddings[1]), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * side * side, 120), nn.ReLU(),
        nn.Linear(120, 84), nn.ReLU(),
        nn.Linear(84, CLASSES[dataset]),
    )  # fmt: skip


def _pooled(side: int, kernel: int, *paddings: int) -> int:
    """The side of an image after convolutions with these paddings, each pooled by 2."""
    for padding in paddings:
        side = (side + 2 * padding - kernel + 1) // 2
    return side


def cnn(dataset: str) -> nn.Module:
    """The small network of Tuddenham et al.: two 5x5 convolutions of 1 and 2 channels, each pooled by 2, and a head.

    On the 8x8 digits the convolutions are 3x3 with padding 1, as in `lenet`.
    """
    channels, height, _ = SHAPES[dataset]
    kernel, padding = (3, 1) if dataset == "digits" else (5, 0)
    side = _pooled(height, kernel, padding, padding)
    return nn.Sequential(
        nn.Conv2d(channels, 1, kernel, padding=padding), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(1, 2, kernel, padding=padding), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(2 * side * side, CLASSES[dataset]),
    )  # fmt: skip


class ChannelsLast(nn.Module):
    """x in the memory layout of channels last, which convolutions keep. The values are the same."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape  # not x.to(memory_format=...), which vmap does not know
        return x.movedim(1, -1).flatten().view(n, h, w, c).movedim(-1, 1)


def conv(dataset: str, widths: tuple[int, ...], average: bool = False) -> nn.Module:
    """Conv-2 and Conv-3 of Larsen et al. 2021: 3x3 convolutions of these widths, each pooled by 2, and a head.

    Pooled by the maximum, as the paper says; `average` as its code does. Initialised as there, see `_lecun_normal`.
    """
    channels, height, _ = SHAPES[dataset]
    layers = [ChannelsLast()]  # twice as fast as the usual layout, where pooling is slow
    for n, m in pairwise([channels, *widths]):
        layers.append(nn.Conv2d(n, m, 3, padding=1))
        # The maximum and ReLU commute, and ReLU of the pooled image is less work. The average does not commute.
        layers += [nn.ReLU(), nn.AvgPool2d(2)] if average else [nn.MaxPool2d(2), nn.ReLU()]
    side = height // 2 ** len(widths)
    return _lecun_normal(nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * side * side, CLASSES[dataset])))


def _lecun_normal(network: nn.Module) -> nn.Module:
    """Weights of variance 1 / fan-in, of a normal cut at two deviations; biases 0, as in flax."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            cut = 0.87962566103423978  # the deviation of a standard normal cut at -2 and 2
            std = module.weight[0].numel() ** -0.5 / cut
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network


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


def _conv(n: int, m: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(n, m, 3, stride, padding=1, bias=False), nn.BatchNorm2d(m)]


def resnet(dataset: str, blocks: int) -> nn.Module:
    """ResNet of 6 blocks + 2 layers (He et al. 2016): stages of 16, 32, 64 channels, Kaiming-normal weights."""
    layers, width = [*_conv(SHAPES[dataset][0], 16), nn.ReLU()], 16
    for channels in (16, 32, 64):
        for _ in range(blocks):
            wider = channels - width
            body = nn.Sequential(*_conv(width, channels, 2 if wider else 1), nn.ReLU(), *_conv(channels, channels))
            layers.append(Residual(body, Widen(wider) if wider else None))
            width = channels
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES[dataset]))
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
    return network


class Scale(nn.Module):
    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def resnet9(dataset: str) -> nn.Module:
    """The ResNet9 of Tuddenham et al.: no biases, two residual blocks, logits times 1/16."""

    def conv(n: int, m: int, *after: nn.Module) -> nn.Module:
        return nn.Sequential(*_conv(n, m), nn.ReLU(), *after)

    def residual(n: int) -> nn.Module:
        return Residual(nn.Sequential(conv(n, n), conv(n, n)), relu=False)

    pool = partial(nn.MaxPool2d, 2)
    return nn.Sequential(
        conv(SHAPES[dataset][0], 64),
        conv(64, 128, pool()), residual(128),
        conv(128, 256, pool()),
        conv(256, 512, pool()), residual(512),
        nn.AdaptiveMaxPool2d(1), nn.Flatten(),
        nn.Linear(512, CLASSES[dataset], bias=False), Scale(1 / 16),
    )  # fmt: skip


MODELS = {
    "fc": fc,
    "lenet": lenet,
    "lenet5": partial(lenet, first_padding=2),
    "cnn": cnn,
    "resnet8": partial(resnet, blocks=1),
    "resnet20": partial(resnet, blocks=3),
    "resnet32": partial(resnet, blocks=5),
    "resnet9": resnet9,
    "conv2": partial(conv, widths=(16, 32)),
    "conv3": partial(conv, widths=(32, 64, 64)),
    "conv2_average": partial(conv, widths=(16, 32), average=True),
    "conv3_average": partial(conv, widths=(32, 64, 64), average=True),
}


TIMM = "timm/"
"""Before the name of a network of timm."""


def build(name: str, dataset: str, seed: int = 0) -> nn.Module:
    """The network `name` for `dataset`, drawn from `seed` alone; "timm/<name>" is timm's.

    Raises:
        ValueError: if one of the names is unknown.
        ImportError: if timm is wanted and not installed.
    """
    check(name)
    if dataset not in SHAPES:
        raise ValueError(f"`dataset` must be one of {', '.join(SHAPES)}, got {dataset!r}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name.startswith(TIMM):
            return _timm().create_model(
                name.removeprefix(TIMM), num_classes=CLASSES[dataset], in_chans=SHAPES[dataset][0]
            )
        return MODELS[name](dataset)


def check(name: str) -> None:
    """Whether a network of this name can be built; raises as `build` does."""
    if name.startswith(TIMM):
        known = _timm().list_models()
        if name.removeprefix(TIMM) not in known:
            near = difflib.get_close_matches(name.removeprefix(TIMM), known)
            raise ValueError(f"`model` must be one that timm knows, got {name!r}; near: {', '.join(near)}.")
    elif name not in MODELS:
        raise ValueError(f"`model` must be one of {', '.join(MODELS)} or {TIMM}<name>, got {name!r}.")


def _timm():
    try:
        import timm
    except ImportError:
        raise ImportError(
            "Networks named timm/... come from timm, which is no requirement of the recipes: pip install timm."
        ) from None
    return timm
