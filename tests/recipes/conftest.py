"""Fixtures of the recipes: small YAMLs, and pretrained models and data for them."""

import itertools
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel, BertTokenizer, LlamaConfig, LlamaForCausalLM

from recipes import run
from recipes.tasks.networks.efficientnet_lite import EfficientNetLite0
from tests.recipes.files import written


WORDS = {"who": ["critics", "viewers", "friends"], "how": ["often", "never"], "what": ["liked", "missed"]}
WORDS |= {"it": ["this film", "the long play"], "end": [".", "!"]}
SHAPE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
SENTENCES = [" ".join(words) for words in itertools.product(*WORDS.values())]


@pytest.fixture
def recipe(tmp_path) -> Path:
    settings = ["model: fc", "batch_size: 256", "epochs: 2", "lr: 0.1", "projection: [full, fastjl]", "d: [3, 4]"]
    return written(tmp_path / "tiny.yaml", *settings, "threads: 1")


@pytest.fixture
def dldr(tmp_path) -> Path:
    shared = ["report: optimisers", "model: fc", "batch_size: 256", "threads: 1", "runs:"]
    sgd = "  - &sgd {optimizer: sgd, lr: 0.1, epochs: 4}"
    basis = "  - {projection: basis, d: 2, samples: 3, trajectory: *sgd, optimizer: [pbfgs, pplusbfgs], epochs: 1}"
    return written(tmp_path / "dldr.yaml", *shared, sgd, basis)


@pytest.fixture
def unreported(monkeypatch):
    """Tables and figures are not what the test is about, and take longer than its runs."""
    monkeypatch.setattr(run, "conclude", lambda *rest: None)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory) -> Path:
    """A folder with a BERT of one layer and its tokenizer."""
    folder = tmp_path_factory.mktemp("encoder")
    words = _tokenizer(folder)
    BertModel(BertConfig(vocab_size=words, max_position_embeddings=16, **SHAPE)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def speaker(tmp_path_factory) -> Path:
    """A folder with a Llama of two layers and its tokenizer, which has the words of a question and its answers."""
    folder = tmp_path_factory.mktemp("speaker")
    words = _tokenizer(folder, "it", "was", "terrible", "great")
    LlamaForCausalLM(
        LlamaConfig(vocab_size=words, tie_word_embeddings=True, **SHAPE | {"num_hidden_layers": 2})
    ).save_pretrained(folder)
    return folder


def _tokenizer(folder: Path, *others: str) -> int:
    """A tokenizer of the sentences' words and others, saved in the folder; how many words it has."""
    words = sorted({word for sentence in SENTENCES for word in sentence.split()} | {*others})
    vocabulary = written(folder / "vocab.txt", "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words)
    BertTokenizer(vocab=str(vocabulary)).save_pretrained(folder)
    torch.manual_seed(0)
    return 5 + len(words)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = pd.DataFrame({"sentence": SENTENCES, "label": [int("liked" in each) for each in SENTENCES]})
    rows = rows.sample(frac=1, random_state=0)
    for name, part in {"train": rows[:24], "validation": rows[24:36], "test": rows[36:]}.items():
        part.to_parquet(folder / f"{name}.parquet", index=False)
    return folder


@pytest.fixture
def sentences(encoder, data) -> dict:
    """Settings for sentences of six words, and folders with them and the encoder."""
    return {"data": str(data), "weights": str(encoder), "length": 12}


@pytest.fixture
def answered(speaker, data) -> dict:
    """Settings for the same sentences, of which a language model says what they are."""
    return {"data": str(data), "weights": str(speaker), "length": 12, "pooling": "answer"}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> dict:
    """Settings for the digits, and a folder with an EfficientNet-Lite0."""
    folder = tmp_path_factory.mktemp("network")
    torch.manual_seed(0)
    save_file(EfficientNetLite0().state_dict(), folder / "model.safetensors")
    return {"dataset": "digits", "data": "", "weights": str(folder), "image_size": 16, "measured_examples": 12}
