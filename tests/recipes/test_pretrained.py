"""The recipe that fine-tunes pretrained models, tiny: random weights, sentences of six words, the digits."""

import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoTokenizer

from recipes import run
from recipes.lab.grid import read
from recipes.lab.results import Results
from recipes.pretrained import images, tasks, text
from recipes.pretrained.methods import HEAD, wrap
from recipes.pretrained.settings import WITHOUT_ADAPTER, Settings
from recipes.training.finetuning import classes_of, trainable
from subspace_peft.adapter.walk import named_layers
from tests.recipes.conftest import SENTENCES
from tests.recipes.files import RECIPES, options, results


FOLDER = RECIPES / "pretrained"
TINY = {"examples": 16, "epochs": 1, "batch_size": 8, "seed": 0, "lr": 0.011, "head_lr": 0.012, "d": 101, "rank": 3}
"""Values that no YAML has, so that they take the place of all and select none."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """A folder for all YAMLs: tiny, many of their runs are the same, and none is made again."""
    return tmp_path_factory.mktemp("shared")


YAMLS = [file for file in sorted(FOLDER.glob("*.yaml")) if read(file).runs]
OF_TASKS = FOLDER / "cifar100_tasks.yaml"
OF_A_BASIS = {"method": "subspace", "projection": "basis", "parameters": "vectors", "source_epochs": 1}
OF_A_BASIS |= {"dataset": "digits"}
WITH_IMAGES = [file for file in YAMLS if read(file).runs[0].has_images and file != OF_TASKS]
ANSWERED = FOLDER / "smollm2.yaml"
WITH_SENTENCES = [file for file in YAMLS if file not in (*WITH_IMAGES, OF_TASKS, ANSWERED)]


@pytest.mark.parametrize("file", WITH_SENTENCES, ids=lambda file: file.stem)
def test_every_yaml_with_sentences_runs_tiny(file, shared, sentences, capsys):
    for result in _made(file, shared, TINY | sentences):
        assert 0 < result["peak_bytes"] < 5e6  # the base has 60 kB, an activation 16 kB
    assert "| weight, kronecker" in capsys.readouterr().out


def test_a_language_model_that_answers_runs_tiny(shared, answered, capsys):
    for result in _made(ANSWERED, shared, TINY | answered):
        assert result["trainable"]["head"] == 0
    shown = capsys.readouterr().out
    assert "| weight, kronecker, rates found |  | 101 |" in shown
    assert re.search(r"\| not trained \|  \| 0 \| [\d.]+ \| [\d.]+ \| 1 \|  \|  \|  \|  \|  \|", shown)


@pytest.mark.parametrize("file", WITH_IMAGES, ids=lambda file: file.stem)
def test_every_yaml_with_images_runs_tiny(file, shared, pictures, capsys, monkeypatch):
    monkeypatch.setattr(images, "HELD_OUT", 12)
    for result in _made(file, shared, TINY | pictures):
        assert 0 < result["peak_bytes"] < 80e6  # the base has 14 MB, its gradient and moments three times that
    assert "| weight, kronecker" in capsys.readouterr().out


def test_a_basis_comes_from_the_other_tasks(pictures, tmp_path, monkeypatch, capsys):
    """The five tasks are pairs of digits: the recipe makes two, and the basis trains on the others where they miss."""
    monkeypatch.setattr(images, "HELD_OUT", 12)
    tiny = pictures | {"examples": 16, "epochs": 1, "batch_size": 8, "d": 3, "source_examples": 16, "source_epochs": 1}
    command = [str(OF_TASKS), *options(tiny, tmp_path), "--task", "0", "2"]
    run.main(command)
    lines = capsys.readouterr().out
    made = {name: each for name, each in results(tmp_path).items() if each["settings"]["projection"] == "basis"}
    assert {each["settings"]["task"] for each in made.values()} == {0, 2}
    assert len(list((tmp_path / "adapters").iterdir())) == 5  # a training on each task, whichever basis it is for
    for name, each in made.items():
        assert each["trainable"]["adapter"] == 3
        assert each["adapter"]["bytes"] < 20_000  # theta_d and the head, without the basis
        assert each["adapter"]["max_difference"] <= 1e-6
        columns = load_file(tmp_path / "bases" / f"{name}.safetensors")
        P = torch.cat([columns[key] for key in sorted(columns)])
        assert P.shape == (2 * 21_008, 3)
        torch.testing.assert_close(P.T @ P, torch.eye(3), atol=1e-4, rtol=0)
        others = [task for task in range(5) if task != each["settings"]["task"]]
        moved = torch.stack([_moved(tmp_path, read(OF_TASKS, tiny | {"task": other}).runs[0]) for other in others], 1)
        left = moved - P @ (P.T @ moved)
        assert left.norm().item() == pytest.approx(torch.linalg.svdvals(moved)[3].item(), rel=1e-3)
    assert "| norms and biases, basis of the other tasks | 3 |" in lines
    assert "mean test accuracy of 2 tasks" in lines
    for missing in ("head", "identity", "basis", "kronecker"):
        part = [
            each for each in read(OF_TASKS, tiny | {"task": 0}).runs if missing not in (each.method, each.projection)
        ]
        text = tasks.text(part, Results(tmp_path))
        assert ("basis of the other tasks |" in text) is (missing != "basis")


def _moved(output: Path, run: Settings) -> torch.Tensor:
    """The increments of a run that saved its adapter, tensor after tensor by name."""
    base = images.base_model(run, 2)
    before = dict(base.named_parameters())
    model = PeftModel.from_pretrained(base, output / "adapters" / run.name)
    increments = {
        f"{name}.{path}": increment.flatten()
        for name, layer in named_layers(model.base_model.model)
        for path, increment in layer.increments(["default"]).items()
    }
    assert increments.keys() < before.keys()
    return torch.cat([increments[name] for name in sorted(increments)]).detach()


def _made(file: Path, folder: Path, tiny: dict) -> list[dict]:
    """The results of a YAML with these values, checked."""
    run.main([str(file), *options(tiny, folder)])
    made = [results(folder)[each.name] for each in read(file, tiny).runs]
    assert {each["settings"]["method"] for each in made} == {each.method for each in read(file).runs}
    for result in made:
        if result["settings"]["method"] not in WITHOUT_ADAPTER:
            assert result["adapter"]["max_difference"] <= 1e-6
        if result["settings"]["method"] != "none":
            last = 0.012 if result["trainable"]["head"] else 0.011
            assert (result["rates"][-1] == last) is not (result["settings"]["lr"] == 0)
        assert result["examples"] == {"training": 16, "validation": 12, "test": 12}
        right = 12 * result["accuracy"]["test"]  # of all test examples
        assert right == pytest.approx(round(right), abs=1e-6)
    assert (folder / "plots" / f"{file.stem}.png").stat().st_size > 10_000
    return made


SIDES = 4 * (32 + 32) + 2 * (32 + 64)
"""Of the six linear modules."""


@pytest.mark.parametrize(
    ("values", "adapter"),
    [
        ({"method": "head"}, 0),
        ({"method": "bitfit"}, 4 * 32 + 64 + 32 + 3 * 32),  # of linear modules, and of three norms
        ({"method": "lora", "rank": 2}, 2 * SIDES),
        ({"method": "lora", "rank": 1, "modules": "query|value"}, 4 * 32),
        ({"method": "vera", "rank": 3}, 6 * 3 + 5 * 32 + 64),
        ({"method": "unilora", "rank": 4, "d": 101}, 101),
        ({"method": "tinylora", "d": 5}, 5),
        ({"method": "tinylora", "d": 101}, 6 * 16),
        ({"method": "fourierft", "d": 101}, 6 * 16),
        ({"method": "waveft", "d": 101}, 6 * 16),
        ({"method": "vblora", "d": 101}, 2 * (32 + SIDES // 32)),
        ({"method": "subspace", "d": 101}, 101),
        ({"method": "subspace", "d": 101, "parameters": "vectors"}, 101),
        ({"method": "subspace", "projection": "identity", "parameters": "vectors"}, 4 * 32 + 64 + 32 + 6 * 32),
        ({"method": "subspace", "d": 7, "coordinates": "low_rank", "rank": 2}, 7),
    ],
    ids=str,
)
def test_a_method_trains_as_many_numbers_as_it_says(values, adapter, sentences):
    made = Settings(**values, **sentences)
    model = wrap(text.base_model(made, 2), made)
    assert trainable(model, HEAD) == {"adapter": adapter, "head": 2 * 32 + 2}


@pytest.mark.parametrize(
    ("values", "adapter"),
    [
        ({"method": "lora", "rank": 1, "modules": "pw|conv_head"}, 22_784),
        ({"method": "lokr", "rank": 1, "modules": "pw|conv_head"}, 7_709),
        ({"method": "bitfit"}, 21_008),  # of the batch norms
        ({"method": "full"}, 3_371_008),
        ({"method": "subspace", "d": 101}, 101),
        ({"method": "subspace", "projection": "identity", "parameters": "vectors"}, 2 * 21_008),
    ],
    ids=str,
)
def test_a_method_trains_as_many_numbers_of_a_network_of_images(values, adapter, pictures):
    made = Settings(**values, **pictures)
    model = wrap(images.base_model(made, 10), made)
    assert trainable(model, HEAD) == {"adapter": adapter, "head": 12_810}


@pytest.mark.parametrize("method", ["vblora", "tinylora", "unilora", "fourierft", "vera"])
def test_a_method_that_takes_no_convolution_says_so(method, pictures):
    made = Settings(method=method, d=1024, rank=2, **pictures)
    with pytest.raises(ValueError, match="`method` must be one of subspace, lora, lokr for convolutions, such as 'n"):
        wrap(images.base_model(made, 10), made)


def test_images_are_split_once_and_batch_norms_keep_their_statistics(pictures, monkeypatch):
    monkeypatch.setattr(images, "HELD_OUT", 20)
    made = Settings(examples=30, **pictures)
    task = images.load(made)
    assert [len(part) for part in (task.training, task.validation, task.test)] == [30, 20, 12]
    batches = [task.collate(list(part)) for part in (task.training, task.validation, task.test)]
    distinct = {tuple(picture.flatten().tolist()) for batch in batches for picture in batch["pixel_values"]}
    assert len(distinct) == 62
    assert batches[0]["pixel_values"].shape == (30, 3, 16, 16)
    model = images.base_model(made, 10).train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    model(**batches[0]).loss.backward()
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


@pytest.mark.parametrize("pooling", ["mean", "first", "answer"])
def test_padding_changes_nothing(sentences, answered, pooling):
    made = Settings(**{"examples": 16, **(answered if pooling == "answer" else sentences), "pooling": pooling})
    task = text.load(made)
    model = text.base_model(made, 2).eval()
    rows = [task.training[at] for at in range(16)]
    assert len({row["length"] for row in rows}) == 2
    with torch.no_grad():
        together = model(**task.collate(rows)).logits
        alone = torch.cat([model(**task.collate([row])).logits for row in rows])
    torch.testing.assert_close(together, alone)


def test_an_answer_is_the_next_word(answered):
    """Loss and logits are those of the language model alone, word after word."""
    made = Settings(examples=4, **answered)
    task, model = text.load(made), text.base_model(made, 2).eval()
    row, words = task.training[0], AutoTokenizer.from_pretrained(answered["weights"])
    asked = words.decode(row["input_ids"], skip_special_tokens=True)
    assert asked.replace(" ", "").removesuffix("itwas") in "".join(SENTENCES).replace(" ", "")
    with torch.no_grad():
        said = model.language_model(torch.tensor([row["input_ids"]])).logits[0, -1]
        answer = model(**task.collate([row]))
    terrible, great = words.convert_tokens_to_ids(["terrible", "great"])
    torch.testing.assert_close(answer.logits[0], said)
    assert classes_of(answer.logits, None, task.words).item() == int(said[great] > said[terrible])
    torch.testing.assert_close(answer.loss, -said.log_softmax(0)[[terrible, great][row["labels"]]])


def test_without_a_validation_set_the_last_training_examples_validate(tmp_path, data, sentences, monkeypatch):
    monkeypatch.setattr(text, "HELD_OUT", 10)
    for name in ("train", "test"):
        (tmp_path / f"{name}.parquet").symlink_to(data / f"{name}.parquet")
    task = text.load(Settings(examples=0, **sentences | {"data": str(tmp_path)}))
    assert (len(task.training), len(task.validation), len(task.test)) == (14, 10, 12)
    numbers = [{tuple(each) for each in split["input_ids"]} for split in (task.training, task.validation)]
    assert not numbers[0] & numbers[1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "dora"}, "`method` must be one of full, head, bitfit, lora, .*, got 'dora'"),
        ({"method": "unilora", "d": 5}, "`rank` must be at least 1 for Uni-LoRA, got 0"),
        ({"method": "tinylora"}, "`d` must be at least 1 for TinyLoRA, got 0"),
        (
            {"method": "subspace", "projection": "basis", "d": 2, "parameters": "vectors"},
            "needs a `task`, .* got -1, v",
        ),
        (OF_A_BASIS | {"task": 0, "d": 5}, "`d` must be at most 4, the number of other tasks, got 5; lower it"),
        (OF_A_BASIS | {"task": 5, "d": 2}, "`task` must be from 0 to 4 for 'digits', got 5"),
        ({"task": 0}, "`task` must be of cifar100 or digits for 'sst2', got 0"),
        ({"length": 0}, "`length` must be at least 1"),
        ({"method": "head", "pooling": "answer"}, "`method` must not be 'head' for `pooling` 'answer'"),
        (
            {"dataset": "imdb", "pooling": "answer"},
            "`dataset` must be one of sst2, subj for `pooling` 'answer', got",
        ),
        ({"method": "lora", "rank": 2, "lr": 0}, "`lr` must be above 0 for LoRA, got 0; rates are found for ours"),
    ],
)
def test_bad_settings_are_errors(values, message):
    with pytest.raises(ValueError, match=message):
        Settings(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "fourierft", "d": 5}, "`d` must be at least 6 for FourierFT, one for each module, got 5"),
        ({"method": "vblora", "d": 91}, "`d` must be at least 92 for VB-LoRA, two vectors and their logits, got 91"),
        (
            {"method": "lora", "rank": 1, "modules": "attn"},
            "`modules` must be found in the name of a linear",
        ),
    ],
)
def test_a_size_that_the_model_does_not_allow_is_an_error(values, message, sentences):
    made = Settings(**values, **sentences)
    with pytest.raises(ValueError, match=message):
        wrap(text.base_model(made, 2), made)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"examples": 25}, "`examples` must be at most the 24 training examples of 'sst2', got 25"),
        ({"data": "", "dataset": "imdb"}, "`dataset` must be one of sst2, subj, or come with a `data` folder"),
    ],
)
def test_data_that_do_not_suffice_are_an_error(values, message, sentences):
    with pytest.raises(ValueError, match=message):
        text.load(Settings(**sentences | values))
