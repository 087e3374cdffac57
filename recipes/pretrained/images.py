"""Images, and the pretrained network under a new head."""

from functools import cache
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import batch_norm, cross_entropy
from transformers.modeling_outputs import ImageClassifierOutput

from recipes.pretrained.settings import Settings
from recipes.tasks import data
from recipes.tasks.networks.efficientnet_lite import FEATURES, EfficientNetLite0, renamed
from recipes.training.finetuning import HELD_OUT, Task, chosen


def load(settings: Settings) -> Task:
    sizes = (settings.image_size, settings.examples, settings.measured_examples, HELD_OUT)
    return _load(settings.dataset, settings.data, settings.task, *sizes)


@cache
def _load(dataset: str, source: str, task: int, size: int, examples: int, measured: int, held_out: int) -> Task:
    """The task of all runs with these settings; an example is the number of its image.

    Raises:
        ValueError: if there are fewer training examples than asked for, or no such data.
    """
    training, test = (_split(dataset, source, split, task) for split in ("train", "test"))
    total = len(training.labels) - held_out
    taken = chosen(examples, total, dataset)
    parts = [(training, taken), (training, slice(total, None)), (test, slice(measured or None))]
    images = torch.cat([split.images[part] for split, part in parts])
    labels = torch.cat([split.labels[part] for split, part in parts])

    def collate(numbers: list[int]) -> dict[str, Tensor]:
        pixels = data.pixels(images[numbers], size).expand(-1, 3, -1, -1)  # as the network was pretrained
        return {"pixel_values": pixels.contiguous(memory_format=torch.channels_last), "labels": labels[numbers]}

    first, second = len(taken), len(taken) + held_out
    return Task(
        training=range(first),
        validation=range(first, second),
        test=range(second, len(labels)),
        collate=collate,
        classes=1 + int(labels.max()),
        longest=0,
    )


def _split(dataset: str, source: str, split: str, task: int) -> data.Split:
    """A split, or those of its images that a task has, their labels from 0."""
    if task < 0:
        return data.load(dataset, source, split)
    whole, coarse = _of_all_tasks(dataset, source, split)
    labels = whole.labels[coarse == task]
    return whole._replace(images=whole.images[coarse == task], labels=torch.searchsorted(labels.unique(), labels))


@cache
def _of_all_tasks(dataset: str, source: str, split: str) -> tuple[data.Split, Tensor]:
    return data.load(dataset, source, split), data.coarse_labels(dataset, source, split)


class FrozenBatchNorm(nn.Module):
    """A batch norm that keeps its statistics."""

    def __init__(self, norm: nn.BatchNorm2d):
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.register_buffer("running_mean", norm.running_mean)
        self.register_buffer("running_var", norm.running_var)

    def forward(self, x: Tensor) -> Tensor:
        return batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class ImageClassifier(nn.Module):
    """A network, of which the batch norms keep the statistics of the pretraining, under a new head."""

    def __init__(self, network: EfficientNetLite0, classes: int):
        super().__init__()
        self.network = network
        self.network.classifier = nn.Identity()
        for name, module in list(network.named_modules()):
            if isinstance(module, nn.BatchNorm2d):
                network.set_submodule(name, FrozenBatchNorm(module))
        self.classifier = nn.Linear(FEATURES, classes)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        logits = self.classifier(self.network(pixel_values))
        loss = None if labels is None else cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def base_model(settings: Settings, classes: int) -> ImageClassifier:
    """The pretrained model under a new head that is drawn from the seed."""
    network = EfficientNetLite0()
    network.load_state_dict(renamed(_weights(settings.weights or settings.base), network))
    torch.manual_seed(settings.seed)
    return ImageClassifier(network, classes)


@cache
def _weights(source: str) -> dict[str, Tensor]:
    """The tensors of a file, of a folder's model.safetensors, or of that of a Hub id."""
    path = Path(source)
    if not path.exists():
        path = Path(hf_hub_download(source, "model.safetensors"))
    if path.is_dir():
        path /= "model.safetensors"
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)
