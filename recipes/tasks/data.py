"""Image data sets as two tensors, decoded once: uint8 images [N, C, H, W] and labels [N], on the device that trains.

A pass over MNIST by tensor indexing costs a twentieth of one through a DataLoader that decodes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad


HUB = {
    "mnist": "ylecun/mnist",
    "fashion_mnist": "zalando-datasets/fashion_mnist",
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "usps": "flwrlabs/usps",
}


COARSE_CLASSES = {"cifar100": 20, "digits": 5}
"""How many there are, where a data set has labels of them too."""


class Split(NamedTuple):
    images: Tensor  # [N, C, H, W] uint8
    labels: Tensor  # [N] int64
    mean: Tensor | float = 0.0  # [C, 1, 1] where inputs are standardised, [C, H, W] where they are centred
    deviation: Tensor | float = 1.0

    def to(self, device: torch.device | str) -> "Split":
        return Split(*(part.to(device) if isinstance(part, Tensor) else part for part in self))

    def first(self, n: int) -> "Split":
        return self._replace(images=self.images[:n], labels=self.labels[:n])

    def batch(self, index: Tensor, augmentation: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Inputs, in [0, 1] before they are standardised or centred, and labels."""
        images = self.images[index]
        if augmentation is not None:
            images = augment(images, augmentation)
        return (images.float() / 255 - self.mean) / self.deviation, self.labels[index]

    def standardized(self, like: "Split") -> "Split":
        """The split with inputs of zero mean and unit variance in each channel, over all pixels of `like`."""
        counts = torch.stack([torch.bincount(c.flatten().long(), minlength=256) for c in like.images.unbind(1)])
        share, value = counts.double() / counts.sum(1, keepdim=True), torch.arange(256, device=counts.device) / 255
        mean = share @ value.double()
        deviation = (share @ value.double().square() - mean.square()).sqrt()
        return self._replace(mean=mean.float()[:, None, None], deviation=deviation.float()[:, None, None])

    def centered(self, like: "Split") -> "Split":
        """The split with the mean image of `like` subtracted from its inputs."""
        return self._replace(mean=like.images.float().mean(0) / 255)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flips each image at random, pads it by 4 zeros and crops it to its size (He et al. 2016)."""
    N, _, height, width = images.shape
    flip = torch.randint(2, (N,), generator=generator).bool()
    top, left = torch.randint(9, (2, N), generator=generator)
    rows = top[:, None] + torch.arange(height)
    columns = left[:, None] + torch.arange(width)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    sample, rows, columns = (i.to(images.device) for i in (torch.arange(N)[:, None, None], rows, columns))
    padded = pad(images, (4, 4, 4, 4)).movedim(1, -1)
    return padded[sample, rows[:, :, None], columns[:, None, :]].movedim(-1, 1).contiguous()


def pixels(images: Tensor, size: int) -> Tensor:
    """uint8 images as floats in [-1, 1], resized to squares of `size` pixels, if that is not 0."""
    scaled = images.float() / 127.5 - 1
    if size in (0, scaled.shape[-1]):
        return scaled
    return interpolate(scaled, size=(size, size), mode="bilinear", align_corners=False)


def load(dataset: str, source: str, split: str) -> Split:
    """`split` ("train" or "test") of a data set of HUB or of "digits", which needs no network.

    `source`: "" for the Hub's copy, another Hub id, or a folder that holds train.parquet and test.parquet, in which
    {dataset} stands for the name of the data set.
    """
    if dataset == "digits":
        return _digits(split)
    return _decode(_rows(dataset, source, split))


def coarse_labels(dataset: str, source: str, split: str) -> Tensor:
    """The class of each image's class, the column coarse_label of CIFAR-100; for digits, pairs of successive ones.

    Raises:
        ValueError: if the data have no such column.
    """
    if dataset == "digits":
        return _digits(split).labels // 2
    rows = _rows(dataset, source, split)
    if "coarse_label" not in rows.column_names:
        raise ValueError(f"The data must have a column coarse_label for a `task`, got {', '.join(rows.column_names)}.")
    return torch.tensor(rows["coarse_label"][:])


def _rows(dataset: str, source: str, split: str) -> datasets.Dataset:
    source = source.replace("{dataset}", dataset)
    if source and Path(source).is_dir():
        if not (Path(source) / f"{split}.parquet").is_file():
            raise ValueError(f"`data` must be a folder with {split}.parquet, {source!r} has none; give another.")
        return datasets.load_dataset("parquet", data_files={split: f"{source}/{split}.parquet"}, split=split)
    if source or dataset in HUB:
        try:
            return datasets.load_dataset(source or HUB[dataset], split=split)
        except OSError as error:
            raise ValueError(
                f"`data` must be a folder with {split}.parquet, or a Hub id that can be reached, got "
                f"{source or HUB[dataset]!r}: {' '.join(str(error).split())[:200]}"
            ) from None
    known = ", ".join(["digits", *HUB])
    raise ValueError(f"`dataset` must be one of {known}, or come with a `data` folder or Hub id, got {dataset!r}.")


def check_batch_size(n: int, size: int) -> None:
    if not 1 <= size <= n:
        raise ValueError(f"`batch_size` must be between 1 and the {n} training images, got {size}.")


def batches(n: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """One epoch: a permutation of n indices in batches of exactly `size`; the remainder is left out."""
    check_batch_size(n, size)
    order = torch.randperm(n, generator=generator)
    return iter(order[: n - n % size].view(-1, size))


def _decode(rows: datasets.Dataset) -> Split:
    image, label = _column(rows, datasets.Image), _column(rows, datasets.ClassLabel)
    columns = rows[:]
    pixels = np.stack([np.asarray(picture) for picture in columns[image]])
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
    return Split(torch.from_numpy(np.ascontiguousarray(pixels)), torch.tensor(columns[label]))


def _column(rows: datasets.Dataset, kind: type) -> str:
    """The first column of this type, since data sets on the Hub call it image or img, label or fine_label."""
    for name, feature in rows.features.items():
        if isinstance(feature, kind):
            return name
    raise ValueError(f"The data must have a column of type {kind.__name__}, got {dict(rows.features)}.")


def _digits(split: str) -> Split:
    """scikit-learn's 1797 digits: always the same 1437 to train and 360 to test, with equal shares of each class."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=360, stratify=labels, random_state=0)
    images, labels = (parts[0], parts[2]) if split == "train" else (parts[1], parts[3])
    pixels = np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    return Split(torch.from_numpy(pixels), torch.from_numpy(labels))
