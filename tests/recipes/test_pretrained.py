"""The recipe that fine-tunes a pretrained encoder, tiny: random weights, sentences of six words."""

import itertools
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer

from recipes import run
from recipes.lab.grid import read
from recipes.pretrained import text
from recipes.pretrained.methods import HEAD, wrap
from recipes.pretrained.report import _pairs, differences
from recipes.pretrained.settings import Settings
from recipes.training.finetuning import trainable
from tests.recipes.files import RECIPES, options, results, written


FOLDER = RECIPES / "pretrained"
WORDS = {"who": ["critics", "viewers", "friends"], "how": ["often", "never"], "what": ["liked", "missed"]}
WORDS |= {"it": ["this film", "the long play"], "end": [".", "!"]}
SENTENCES = [" ".join(words) for words in itertools.product(*WORDS.values())]
TINY = {"examples": 16, "epochs": 1, "batch_size": 8, "seed": 0, "lr": 0.011, "head_lr": 0.012, "d": 101, "rank": 3}
"""Values that no YAML has, so that they take the place of all and select none."""


@pytest.fixture(scope="session")
def encoder(tmp_path_factory) -> Path:
    """A folder with a BERT of one layer and its tokenizer."""
    folder = tmp_path_factory.mktemp("encoder")
    words = sorted({word for sentence in SENTENCES for word in sentence.split()})
    vocabulary = written(folder / "vocab.txt", "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words)
    BertTokenizer(vocab=str(vocabulary)).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=5 + len(words), max_position_embeddings=16, **shape)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = pd.DataFrame({"sentence": SENTENCES, "label": [int("liked" in each) for each in SENTENCES]})
    rows = rows.sample(frac=1, random_state=0)
    for name, part in {"train": rows[:24], "validation": rows[24:36], "test": rows[36:]}.items():
        part.to_parquet(folder / f"{name}.parquet", index=False)
    return folder


@pytest.fixture
def settings(encoder, data) -> dict:
    return {"data": str(data), "weights": str(encoder), "length": 12}


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """A folder for all YAMLs: tiny, many of their runs are the same, and none is made again."""
    return tmp_path_factory.mktemp("shared")


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_yaml_runs_tiny(file, shared, settings, capsys):
    tiny = TINY | settings
    run.main([str(file), *options(tiny, shared)])
    made = [results(shared)[each.name] for each in read(file, tiny).runs]
    assert {each["settings"]["method"] for each in made} == {each.method for each in read(file).runs}
    for result in made:
        if result["settings"]["method"] not in ("full", "head", "bitfit"):
            assert result["adapter"]["max_difference"] <= 1e-6
        assert result["examples"] == {"training": 16, "validation": 12, "test": 12}
        assert 0 < result["peak_bytes"] < 5e6  # the base has 60 kB, an activation 16 kB
        right = 12 * result["accuracy"]["test"]  # of all test examples
        assert right == pytest.approx(round(right), abs=1e-6)
    assert "| weight, fastjl | " in capsys.readouterr().out
    assert (shared / "plots" / f"{file.stem}.png").stat().st_size > 10_000


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
        ({"method": "subspace", "d": 7, "coordinates": "low_rank", "rank": 2}, 7),
    ],
    ids=str,
)
def test_a_method_trains_as_many_numbers_as_it_says(values, adapter, settings):
    made = Settings(**values, **settings)
    model = wrap(text.base_model(made, 2), made)
    assert trainable(model, HEAD) == {"adapter": adapter, "head": 2 * 32 + 2}


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_padding_changes_nothing(settings, pooling):
    made = Settings(examples=16, pooling=pooling, **settings)
    task = text.load(made)
    model = text.base_model(made, 2).eval()
    rows = [task.training[at] for at in range(16)]
    assert len({row["length"] for row in rows}) == 2
    with torch.no_grad():
        together = model(**task.collate(rows)).logits
        alone = torch.cat([model(**task.collate([row])).logits for row in rows])
    torch.testing.assert_close(together, alone)


def test_without_a_validation_set_the_last_training_examples_validate(tmp_path, data, settings, monkeypatch):
    monkeypatch.setattr(text, "HELD_OUT", 10)
    for name in ("train", "test"):
        (tmp_path / f"{name}.parquet").symlink_to(data / f"{name}.parquet")
    task = text.load(Settings(examples=0, **settings | {"data": str(tmp_path)}))
    assert (len(task.training), len(task.validation), len(task.test)) == (14, 10, 12)
    numbers = [{tuple(each) for each in split["input_ids"]} for split in (task.training, task.validation)]
    assert not numbers[0] & numbers[1]


def test_differences_are_paired_by_seed():
    accuracies = {("weight, kronecker", 0): 80, ("weight, kronecker", 1): 84, ("weight, kronecker", 2): 70}
    accuracies |= {("weight, fastjl", 0): 81, ("weight, fastjl", 1): 82}
    rows = [
        {
            "label": label,
            "seed": seed,
            "d": 64,
            "lr": 0.01,
            "head_lr": 0.1,
            "test": value,
            "validation": 50,
            "test_examples": 100,
        }
        | {"validation_examples": 100}
        for (label, seed), value in accuracies.items()
    ]
    rows += [row | {"d": 256, "test": row["test"] + row["seed"]} for row in rows]
    paired = differences(pd.DataFrame(rows))
    row = paired.set_index(["d", "split"]).loc[64, "test"]
    assert row.each == [-1, 2]
    assert (row["mean"], row.error) == pytest.approx((0.5, 1.5))
    assert "| all |  | test set | 82.25 | 81.75 | 0.50 ± 0.87 | 4 pairs |  |" in _pairs(paired)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "dora"}, "`method` must be one of full, head, bitfit, lora, .*, got 'dora'"),
        ({"method": "unilora", "d": 5}, "`rank` must be at least 1 for Uni-LoRA, got 0"),
        ({"method": "tinylora"}, "`d` must be at least 1 for TinyLoRA, got 0"),
        ({"length": 0}, "`length` must be at least 1"),
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
        ({"method": "lora", "rank": 1, "modules": "attn"}, "`modules` must be found in the name of a linear module"),
    ],
)
def test_a_size_that_the_model_does_not_allow_is_an_error(values, message, settings):
    made = Settings(**values, **settings)
    with pytest.raises(ValueError, match=message):
        wrap(text.base_model(made, 2), made)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"examples": 25}, "`examples` must be at most the 24 training examples of 'sst2', got 25"),
        ({"data": "", "dataset": "imdb"}, "`dataset` must be one of sst2, subj, or come with a `data` folder"),
    ],
)
def test_data_that_do_not_suffice_are_an_error(values, message, settings):
    with pytest.raises(ValueError, match=message):
        text.load(Settings(**settings | values))
