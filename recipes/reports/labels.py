"""Names for groups of runs: what they are, and the settings in which runs of that kind differ, in words."""

from collections.abc import Callable, Collection, Iterable
from typing import Any

from recipes.lab.settings import Run


NAMES = {
    "digits": "digits",
    "mnist": "MNIST",
    "fashion_mnist": "Fashion-MNIST",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "usps": "USPS",
    "fc": "FC",
    "lenet": "LeNet",
    "lenet_mnist": "LeNet, MNIST",
    "fc_mnist": "FC, MNIST",
    "lenet5": "LeNet-5",
    "untied_lenet": "Untied LeNet",
    "fc_lenet": "FC-LeNet",
    "fc_tied_lenet": "FC-Tied-LeNet",
    "cnn": "CNN",
    "all-MiniLM-L6-v2": "MiniLM-L6",
    "tf_efficientnet_lite0.in1k": "EfficientNet-Lite0",
    "sst2": "SST-2",
    "subj": "SUBJ",
    "conv2": "Conv-2",
    "conv3": "Conv-3",
    "conv2_average": "Conv-2, average pooling",
    "conv3_average": "Conv-3, average pooling",
    "resnet": "ResNet",
    "resnet20v1": "ResNet20v1",
    "mlp": "MLP",
    "vit": "ViT",
    "fastfood": "Fastfood",
    "kronecker": "Kronecker",
    "fastjl": "FastJL",
    "sgd": "SGD",
    "adam": "Adam",
    "adamw": "AdamW",
    "adam_larsen": "Adam of Larsen et al.",
    "pbfgs": "P-BFGS",
    "pbfgs_paper": "P-BFGS, y of two batches",
    "pplusbfgs": "P⁺-BFGS",
    "pplusbfgs_paper": "P⁺-BFGS, y of two batches",
    "class_gradient": "class gradient, Gram",
    "class_gradient_all": "class gradient, Gram, all examples",
    "class_gradient_poster": "class gradient, poster",
}
"""Data sets, networks, projections and optimisers as a text writes them."""
SAID = {
    "dataset": "{}",
    "model": "{}",
    "projection": "{}",
    "optimizer": "{}",
    "batch_size": "batches of {}",
    "lr": "rate {}",
    "head_lr": "classifier at {}",
    "start": "{} start",
    "d": "d = {}",
    "rank": "rank {}",
    "burn_in": "t = {}",
    "samples": "{} samples",
    "nnz_per_row": "{} nonzeros a row",
    "normalization": "P normalised by {}",
    "epochs": "{} epochs",
    "images": "{} images",
    "momentum": "momentum {}",
    "weight_decay": "weight decay {}",
    "schedule": "{} schedule",
    "probability": "probability {}",
    "resolution": "resolution {}",
    "d_min": "from d = {}",
    "d_max": "up to d = {}",
    "seeds": "{} seeds",
    "max_runs": "at most {} runs",
}
"""Settings in words. The first ones tell runs apart, where several could."""
TRAJECTORY = "trajectory "
"""Before a setting of the run whose trajectory a run uses."""
TASK = ("dataset", "model")
Record = dict[str, Any]


def name(key: Any) -> str:
    return NAMES.get(key, str(key))


def say(key: str, value: Any) -> str:
    """A setting and its value in words."""
    if key.startswith(TRAJECTORY):
        return f"{say(key.removeprefix(TRAJECTORY), value)} of the trajectory"
    value = f"{value:g}" if isinstance(value, float) else name(value)
    return SAID.get(key, key.replace("_", " ") + " {}").format(value)


def flat(record: Record, besides: Collection[str] = ()) -> Record:
    """The settings, those of the trajectory among them, without those that are no difference."""
    plain = {key: value for key, value in record.items() if key not in {*besides, "trajectory"}}
    sampled = record.get("trajectory") or {}
    return plain | {TRAJECTORY + key: value for key, value in sampled.items() if key not in {*besides, "trajectory"}}


def distinguishing(records: list[Record]) -> list[str]:
    """The settings that tell the records apart: as few as do so, in the order of `SAID`."""
    chosen: list[str] = []
    for key in dict.fromkeys([*SAID, *(key for record in records for key in record)]):
        longer = [*chosen, key]
        if _groups(records, longer) > _groups(records, chosen):
            chosen = longer
    return chosen


def _groups(records: list[Record], keys: list[str]) -> int:
    return len({tuple(str(record.get(key)) for key in keys) for record in records})


def apart(records: list[Record]) -> list[str]:
    """What tells each record from the others, in words."""
    keys = distinguishing(records)
    return [", ".join(say(key, record[key]) for key in keys if key in record) for record in records]


def labels(
    runs: Iterable[Run],
    kind: Callable[[Any], str],
    besides: Collection[str] = ("d", "seed"),
    task: Collection[str] = TASK,
) -> dict[str, str]:
    """By the run's name: its kind in words, and the settings in which runs of that kind on the same task differ.

    So runs that differ in more than what `besides` names, such as in their rate, are never averaged.

    Args:
        kind: The words that runs of one kind share.
        besides: Settings that do not tell runs apart.
        task: Settings whose values have labels of their own.
    """
    kinds: dict[tuple, list[Run]] = {}
    for run in runs:
        record = run.record()
        kinds.setdefault((kind(run), *(record.get(key) for key in task)), []).append(run)
    names = {}
    for (words, *_), members in kinds.items():
        differences = apart([flat(run.record(), besides) for run in members])
        for run, difference in zip(members, differences, strict=True):
            names[run.name] = f"{words}, {difference}" if difference else words
    return names
