import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from recipes.tasks.data import Split, augment, batches, load


@pytest.mark.parametrize(("shape", "names"), [((5, 5), ("image", "label")), ((4, 6, 3), ("img", "fine_label"))])
def test_a_folder_of_parquet_files(tmp_path, shape, names):
    """Grey and colour images, under the column names that the Hub's copies use."""
    pixels = np.random.default_rng(0).integers(0, 256, (7, *shape), dtype=np.uint8)
    features = datasets.Features(zip(names, (datasets.Image(), datasets.ClassLabel(3)), strict=True))
    rows = {names[0]: [{"bytes": _png(p), "path": None} for p in pixels], names[1]: [0, 1, 2, 0, 1, 2, 0]}
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "test.parquet")

    images, labels, *_ = load("mnist", str(tmp_path), "test")
    assert torch.equal(load(tmp_path.name, f"{tmp_path.parent}/{{dataset}}", "test").images, images)

    assert images.dtype == torch.uint8
    expected = pixels[:, None] if len(shape) == 2 else pixels.transpose(0, 3, 1, 2)
    assert np.array_equal(images.numpy(), expected)
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_digits_are_split_once_and_for_all():
    training, test = load("digits", "", "train"), load("digits", "", "test")
    assert training.images.shape == (1437, 1, 8, 8)
    assert test.images.shape == (360, 1, 8, 8)
    assert int(training.images.max()) == 255
    assert test.labels.bincount().tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    assert test.labels[:10].tolist() == load("digits", "", "test").labels[:10].tolist()


def test_inputs_lie_between_0_and_1():
    split = Split(torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1), torch.arange(3))
    images, labels = split.batch(torch.tensor([2, 1]))
    assert images.flatten().tolist() == pytest.approx([1.0, 0.2])
    assert labels.tolist() == [2, 1]


def test_an_epoch_is_a_permutation_in_full_batches():
    epoch = list(batches(10, 3, torch.Generator().manual_seed(0)))
    assert [len(index) for index in epoch] == [3, 3, 3]
    assert len(set(torch.cat(epoch).tolist())) == 9
    assert torch.equal(torch.cat(epoch), torch.cat(list(batches(10, 3, torch.Generator().manual_seed(0)))))
    with pytest.raises(ValueError, match="`batch_size` must be between 1 and the 10 training images, got 11"):
        batches(10, 11, torch.Generator())


def test_an_unknown_data_set_is_an_error():
    with pytest.raises(ValueError, match="`dataset` must be one of digits, mnist.*got 'svhn'"):
        load("svhn", "", "train")


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def test_standardised_inputs_have_zero_mean_and_unit_variance():
    split = load("digits", "", "train")
    inputs, _ = split.standardized(split).batch(torch.arange(len(split.labels)))
    assert inputs.mean().item() == pytest.approx(0, abs=1e-4)
    assert inputs.std(correction=0).item() == pytest.approx(1, abs=1e-4)


def test_augmentation_flips_and_crops():
    images = torch.arange(2 * 3 * 6 * 6, dtype=torch.uint8).view(2, 3, 6, 6).repeat(100, 1, 1, 1)
    moved = augment(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    padded = torch.nn.functional.pad(images[0], (4, 4, 4, 4))
    windows = [padded[:, i : i + 6, j : j + 6] for i in range(9) for j in range(9)]
    allowed = {bytes(w.flatten().tolist()) for window in windows for w in (window, window.flip(-1))}
    found = {bytes(image.flatten().tolist()) for image in moved[::2]}
    assert found <= allowed
    assert len(found) > 50
