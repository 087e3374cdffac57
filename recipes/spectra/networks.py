"""The networks that are watched, and what they make of images."""

import itertools

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import ViTConfig, ViTForImageClassification

from recipes.lab.settings import PlainSettings
from recipes.tasks.data import Split


EVALUATED_TOGETHER = 500


def network(settings: PlainSettings, pixels: tuple[int, int, int], classes: int) -> nn.Module:
    """An MLP of `widths`, a small ViT of `shape`, or else the ViT of that folder or Hub id under a new classifier.

    Start "default": as torch and transformers draw it. "orthogonal": all singular values 1, biases 0.
    """
    torch.manual_seed(settings["seed"])
    channels, height, width = pixels
    if settings["model"] == "vit":
        shape = settings["shape"] | {"image_size": height, "num_channels": channels}
        model = ViTForImageClassification(ViTConfig(**shape, num_labels=classes))
    elif settings["model"] == "mlp":
        activation = {"relu": nn.ReLU, "linear": nn.Identity}[settings["activation"]]
        layers = [nn.Flatten()]
        sizes = [channels * height * width, *map(int, settings["widths"].split("-")), classes]
        for n, m in itertools.pairwise(sizes):
            layers += [nn.Linear(n, m), activation()]
        model = nn.Sequential(*layers[:-1])
    else:
        model = ViTForImageClassification.from_pretrained(
            settings["model"], num_labels=classes, ignore_mismatched_sizes=True
        )
    if settings["start"] == "orthogonal":
        for parameter in model.parameters():
            nn.init.orthogonal_(parameter) if parameter.ndim == 2 else nn.init.zeros_(parameter)
    return model


def logits(model: nn.Module, split: Split, index: Tensor, settings: PlainSettings) -> tuple[Tensor, Tensor]:
    """Logits for images scaled to [-1, 1], and their labels."""
    x, size = split.images[index].float() / 127.5 - 1, settings["image_size"]
    if size and size != x.shape[-1]:
        x = interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=settings["bf16"]):
        found = model(x)
    return (found if isinstance(found, Tensor) else found.logits).float(), split.labels[index]


@torch.no_grad()
def accuracy(model: nn.Module, split: Split, settings: PlainSettings) -> float:
    model.eval()
    parts = torch.arange(len(split.labels), device=split.labels.device).split(EVALUATED_TOGETHER)
    right = 0
    for index in parts:
        z, y = logits(model, split, index, settings)
        right += (z.argmax(1) == y).sum().item()
    model.train()
    return right / len(split.labels)
