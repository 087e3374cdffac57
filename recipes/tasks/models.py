"""The networks of the recipes, by name and data set, with the parameter counts of the papers.

                     digits 8x8    mnist, fashion_mnist 28x28    cifar10 32x32    cifar100 32x32
    fc                    3 466                       199 210        1 051 930         1 076 320
    lenet                19 754                        44 426           62 006            69 656
    untied_lenet         36 734                       286 334          658 238           665 888
    fc_lenet             68 606                     3 640 574       16 397 726        16 405 376
    fc_tied_lenet        24 890                       193 370          297 734           305 384
    resnet              292 666                       292 666          292 954           298 804
    conv2                 6 090                        20 490           25 578           209 988
    conv3                56 394                        61 514           66 570           158 820
    resnet20v1          272 186                       272 186          272 474           278 324
    lenet5               19 754                        61 706           83 126            90 776
    resnet8              75 002                        75 002           75 290            81 140
    resnet20            269 434                       269 434          269 722           275 572
    resnet32            463 866                       463 866          464 154           470 004
    cnn                     120                           408              638             5 228
    resnet9           6 571 968                     6 571 968        6 573 120         6 619 200
    mlp               5 588 000                     5 588 000       10 164 000        10 344 000

fc to resnet: Li et al. 2018 and Gargiulo 2023. conv2 to resnet20v1: Larsen et al. 2021; conv2_average, conv3_average
pool as their code does. lenet5 to resnet32: Li et al. 2021 (DLDR). cnn, resnet9: Tuddenham et al. 2020. mlp: Qu 2023,
for usps (16x16) as for mnist. ReLU after every layer but the last; torch's default initialisation where nothing else
is said.
"""

import difflib
from functools import partial

import torch
from torch import nn

from recipes.tasks.networks.plain import cnn, conv, fc, lenet, mlp
from recipes.tasks.networks.residual import resnet, resnet9, resnet20v1, resnet_dldr
from recipes.tasks.networks.variants import fc_lenet, fc_tied_lenet, untied_lenet


SHAPES = {
    "digits": (1, 8, 8),
    "mnist": (1, 28, 28),
    "fashion_mnist": (1, 28, 28),
    "cifar10": (3, 32, 32),
    "cifar100": (3, 32, 32),
    "usps": (1, 16, 16),
}
CLASSES = dict.fromkeys(SHAPES, 10) | {"cifar100": 100}


MODELS = {
    "fc": fc,
    "lenet": lenet,
    "lenet5": partial(lenet, first_padding=2),
    "untied_lenet": untied_lenet,
    "fc_lenet": fc_lenet,
    "fc_tied_lenet": fc_tied_lenet,
    "cnn": cnn,
    "conv2": partial(conv, widths=(16, 32)),
    "conv3": partial(conv, widths=(32, 64, 64)),
    "conv2_average": partial(conv, widths=(16, 32), average=True),
    "conv3_average": partial(conv, widths=(32, 64, 64), average=True),
    "resnet": resnet,
    "resnet8": partial(resnet_dldr, blocks=1),
    "resnet20": partial(resnet_dldr, blocks=3),
    "resnet32": partial(resnet_dldr, blocks=5),
    "resnet20v1": resnet20v1,
    "resnet9": resnet9,
    "mlp": mlp,
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
        return MODELS[name](SHAPES[dataset], CLASSES[dataset])


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
