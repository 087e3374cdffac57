"""Images as tensors, decoded once; a batch is indexed, resized and scaled to [-1, 1] when Trainer asks for it."""

import torch
from torch import Tensor

from recipes.tasks.data import Split, augment, load, pixels
from recipes.vit_lora.settings import Settings


def splits(settings: Settings, whole: tuple[Split, Split]) -> tuple[Split, Split]:
    """What a run trains on, and what its accuracy is of.

    Raises:
        ValueError: if the training images and those held out of them overlap.
    """
    training, test = whole
    total, held = len(training.labels), settings.validation
    n = settings.images or total - held
    if n < settings.batch_size or n + held > total:
        raise ValueError(
            f"`images` must be at least `batch_size` = {settings.batch_size}, and with `validation` = {held} at most "
            f"the {total} of {settings.dataset}, got {n}; change one of them."
        )
    measured = Split(training.images[total - held :], training.labels[total - held :]) if held else test
    return training.first(n), measured


def whole(dataset: str, data: str) -> tuple[Split, Split]:
    return load(dataset, data, "train"), load(dataset, data, "test")


class Batches:
    """The collator of Trainer, for a data set that is `range(n)`: indices to pixel values [B, C, H, W] and labels."""

    def __init__(self, split: Split, settings: Settings, training: bool = False):
        self.split, self.size = split, settings.image_size
        self.random = torch.Generator().manual_seed(settings.seed) if training and settings.augment else None

    def __call__(self, indices: list[int]) -> dict[str, Tensor]:
        index = torch.tensor(indices, device=self.split.labels.device)
        images = self.split.images[index]
        if self.random is not None:
            images = augment(images, self.random)
        # in [-1, 1], as google/vit-base-patch16-224-in21k wants them
        return {"pixel_values": pixels(images, self.size), "labels": self.split.labels[index]}
