"""The recipe that fine-tunes a ViT, tiny: a pretraining on digits, and every method on top of it."""

import json
from pathlib import Path

import pytest

from recipes.vit_lora import finetune
from recipes.vit_lora.settings import read


FOLDER = Path(finetune.__file__).parent
TINY = {"dataset": "digits", "data": "", "images": 32, "epochs": 1, "batch_size": 16, "seed": 0, "image_size": 8}
TINY |= {"lr": 0.01, "head_lr": 0.01, "bf16": False, "validation": 0}
SHAPE = {"patch_size": 4, "hidden_size": 16, "layers": 1, "heads": 2}


def options(values: dict, output: Path) -> list[str]:
    return [word for key, value in values.items() for word in (f"--{key}", str(value))] + ["--output", str(output)]


def results(folder: Path) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted((folder / "results").glob("*.json"))]


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory) -> Path:
    """A folder with the checkpoint of a tiny ViT."""
    folder = tmp_path_factory.mktemp("pretrained")
    finetune.main([str(FOLDER / "pretrain.yaml"), *options(TINY | SHAPE | {"checkpoint": "tiny"}, folder)])
    assert (folder / "checkpoints" / "tiny" / "model.safetensors").exists()
    return folder


@pytest.fixture
def folder(pretrained, tmp_path) -> Path:
    (tmp_path / "checkpoints").symlink_to(pretrained / "checkpoints")
    return tmp_path


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_yaml_runs_tiny(file, folder, capsys):
    adapted = any(run.base for run in read(file).runs)
    tiny = TINY | ({"base": "tiny", "d": 5, "rank": 1} if adapted else SHAPE | {"checkpoint": "mine"})
    finetune.main([str(file), *options(tiny, folder)])
    found = results(folder)
    assert {result["settings"]["method"] for result in found} == {run.method for run in read(file).runs}
    for result in found:
        if result["settings"]["method"] not in ("full", "head"):
            assert result["adapter"]["max_difference"] <= 1e-6
