"""The recipe that fine-tunes a ViT, tiny: a pretraining on digits, and every method on top of it."""

from pathlib import Path

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from recipes import run
from recipes.lab.grid import read
from recipes.lab.results import read_measurement
from recipes.tasks.data import Split
from recipes.training.finetuning import trainable
from recipes.vit_lora import cost
from recipes.vit_lora.images import Batches, splits
from recipes.vit_lora.methods import HEAD, base_model, wrap
from recipes.vit_lora.settings import Settings
from tests.recipes.files import RECIPES, options, results, written


FOLDER = RECIPES / "vit_lora"
TINY = {"dataset": "digits", "data": "", "images": 32, "epochs": 1, "batch_size": 16, "seed": 0, "image_size": 8}
TINY |= {"lr": 0.01, "head_lr": 0.01, "bf16": False, "validation": 0}
SHAPE = {"patch_size": 4, "hidden_size": 16, "layers": 1, "heads": 2}
SMALLEST = {"d": 5, "rank": 3, "projection": "dense", "lr": 0.011, "head_lr": 0.011}
"""Values that no YAML has, so that they take the place of all and select none."""


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory) -> Path:
    """A folder with the checkpoint of a tiny ViT."""
    folder = tmp_path_factory.mktemp("pretrained")
    run.main([str(FOLDER / "pretrain.yaml"), *options(TINY | SHAPE | {"checkpoint": "tiny"}, folder)])
    assert (folder / "checkpoints" / "tiny" / "model.safetensors").exists()
    return folder


@pytest.fixture
def folder(pretrained, tmp_path) -> Path:
    (tmp_path / "checkpoints").symlink_to(pretrained / "checkpoints")
    return tmp_path


@pytest.fixture(scope="module")
def shared(pretrained, tmp_path_factory) -> Path:
    """A folder for all YAMLs: tiny, many of their runs are the same, and none is made again."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "checkpoints").symlink_to(pretrained / "checkpoints")
    return folder


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_yaml_runs_tiny(file, shared, capsys):
    adapted = any(each.base for each in read(file).runs)
    tiny = TINY | ({"base": "tiny", **SMALLEST} if adapted else SHAPE | {"checkpoint": "mine"})
    run.main([str(file), *options(tiny, shared)])
    found = [results(shared)[each.name] for each in read(file, tiny).runs]
    assert {result["settings"]["method"] for result in found} == {each.method for each in read(file).runs}
    for result in found:
        if result["settings"]["method"] not in ("full", "head"):
            assert result["adapter"]["max_difference"] <= 1e-6
    printed = capsys.readouterr().out
    if adapted:
        assert "| LoRA | 3 |  | " in printed
    if "plots" in printed:
        assert (shared / "plots" / f"{file.stem}.png").stat().st_size > 10_000


@pytest.fixture
def recipe(folder) -> Path:
    ours = "  - {method: subspace, projection: fastjl, d: [5, 20]}"
    return written(
        folder / "ours.yaml", "kind: vit_lora", "runs:", "  - {method: full}", "  - {method: lora, rank: 1}", ours
    )


def test_results_say_what_was_trained_and_are_not_made_again(recipe, folder, capsys):
    command = [str(recipe), *options(TINY | {"base": "tiny", "images": 64}, folder)]
    run.main(command)
    printed = capsys.readouterr().out
    found = {(r["settings"]["method"], r["settings"]["d"]): r for r in results(folder).values()}
    assert found["subspace", 20]["trainable"] == {"adapter": 20, "head": 170}
    assert found["lora", 0]["trainable"] == {"adapter": 4 * 32 + 2 * 80, "head": 170}
    assert len({r["base_digest"] for r in found.values()}) == 1
    assert found["subspace", 20]["adapter"]["bytes"] < found["full", 0]["adapter"]["bytes"] / 4
    assert "d_int90, weight, fastjl: " in printed
    right = 360 * found["full", 0]["final_accuracy"]  # of all test images
    assert right == pytest.approx(round(right), abs=1e-6)
    before = {file: file.stat().st_mtime_ns for file in (folder / "results").iterdir()}
    run.main(command)
    assert {file: file.stat().st_mtime_ns for file in (folder / "results").iterdir()} == before


def test_lora_of_rank_two_trains_the_published_number():
    with torch.device("meta"):
        model = ViTForImageClassification(ViTConfig(num_labels=10))
        count = trainable(wrap(model, Settings(method="lora", rank=2), steps=100), HEAD)
    assert count == {"adapter": 331_776, "head": 7690}


def test_adalora_regularises_and_prunes(folder, recipe):
    run.main([str(recipe), *options(TINY | {"base": "tiny", "method": "adalora", "rank": 2}, folder)])
    (result,) = results(folder).values()
    assert result["trainable"]["adapter"] == 3 * (4 * 33 + 2 * 81)  # starts from rank 3
    (with_regularisation,) = result["train_loss"]
    run.main([str(recipe), *options(TINY | {"base": "tiny", "method": "lora", "rank": 3}, folder)])
    (without,) = (r["train_loss"][0] for r in results(folder).values() if r["settings"]["method"] == "lora")
    assert with_regularisation > without + 0.1


def test_costs_are_those_of_the_training(recipe, folder, capsys):
    tiny = {key: value for key, value in TINY.items() if key not in ("data", "images")} | {"base": "tiny"}
    cost.main([str(recipe), "--steps", "2", "--rounds", "1", *options(tiny | {"method": "lora", "rank": 1}, folder)])
    (row,) = read_measurement(folder / "costs_ours.jsonl")["runs"]
    assert row["trained"] == 288 + 170
    assert row["step_ms"]["cpu"] > 0
    assert 0.02 < row["peak_mb"] < 5  # the weights alone are 15 KB
    assert "| LoRA rank=1 lr=0.01 seed=0 | 458 | " in capsys.readouterr().out


def test_images_are_scaled_and_resized():
    split = Split(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 4, 4), torch.tensor([3, 4]))
    batch = Batches(split, Settings(image_size=8))([1, 0])
    assert batch["labels"].tolist() == [4, 3]
    torch.testing.assert_close(batch["pixel_values"], torch.tensor([1.0, -1.0]).view(2, 1, 1, 1).expand(2, 1, 8, 8))


def test_what_is_held_out_is_not_trained_on():
    whole = Split(torch.zeros(10, 1, 2, 2, dtype=torch.uint8), torch.arange(10))
    training, measured = splits(Settings(batch_size=2, validation=4), (whole, whole))
    assert (training.labels.tolist(), measured.labels.tolist()) == ([0, 1, 2, 3, 4, 5], [6, 7, 8, 9])
    with pytest.raises(ValueError, match="`images` must be .* at most the 10 of mnist, got 7"):
        splits(Settings(batch_size=2, validation=4, images=7), (whole, whole))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "dora"}, "`method` must be one of full, head, lora, adalora, subspace, got"),
        ({"method": "subspace"}, "`d` must be at least 1"),
        ({"method": "lora"}, "`rank` must be at least 1 for LoRA"),
        ({"method": "subspace", "coordinates": "low_rank", "d": 3}, "`rank` must be at least 1 for low rank"),
        ({"method": "lora", "rank": 1, "checkpoint": "mine"}, "`checkpoint` keeps a whole model"),
        ({"epochs": 0}, "`epochs` must be at least 1"),
    ],
)
def test_bad_settings_are_errors(values, message):
    with pytest.raises(ValueError, match=message):
        Settings(**values)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ranks: 2", "got `ranks`; near: rank"),
        ("epochs: 1.5", "`epochs` must be of type int"),
        ("report: all", "`report` must name a module of recipes/ that has text, got 'all'"),
    ],
)
def test_a_bad_yaml_is_an_error(line, message, tmp_path):
    (tmp_path / "bad.yaml").write_text(f"kind: vit_lora\n{line}")
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "bad.yaml")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"base": "nowhere"}, "`base` must be a Hub id or a checkpoint in .*run the YAML that"),
        ({"base": "tiny", "image_size": 16}, "channels and pixels of the base 'tiny'"),
        ({"patch_size": 5}, "`patch_size` must divide `image_size` = 8"),
    ],
)
def test_a_model_that_does_not_fit_is_an_error(values, message, folder):
    split = Split(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.arange(2))
    with pytest.raises(ValueError, match=message):
        base_model(Settings(**values), split, 10, folder / "checkpoints")
