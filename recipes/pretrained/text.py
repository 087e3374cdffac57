"""Sentences as token numbers, and the pretrained model that reads them."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import datasets
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModel, AutoTokenizer
from transformers.modeling_outputs import SequenceClassifierOutput

from recipes.pretrained import answers
from recipes.pretrained.settings import Settings
from recipes.training.finetuning import HELD_OUT, Task, chosen


HUB = {"sst2": "SetFit/sst2", "subj": "SetFit/subj"}
"""Copies whose test set has labels."""
SENTENCE = ("sentence", "text")
"""What the column of the sentences may be called."""


def load(settings: Settings) -> Task:
    return _load(
        settings.dataset, settings.data.replace("{dataset}", settings.dataset), _source(settings), settings.length,
        settings.examples, settings.measured_examples, settings.pooling == "answer",
    )  # fmt: skip


@cache
def _load(dataset: str, data: str, source: str, length: int, examples: int, measured: int, has_question: bool) -> Task:
    """The task of all runs with these settings.

    Raises:
        ValueError: if there are fewer training examples than asked for, or no such data.
    """
    tokenizer = answers.tokenizer(source) if has_question else AutoTokenizer.from_pretrained(source)
    question = answers.QUESTIONS[dataset].text if has_question else ""
    splits = {name: _tokenized(rows, tokenizer, length, question) for name, rows in _rows(dataset, data).items()}
    training = splits["train"]
    if "validation" not in splits:
        splits["validation"] = training.select(range(len(training) - HELD_OUT, len(training)))
        training = training.select(range(len(training) - HELD_OUT))
    training = training.select(chosen(examples, len(training), dataset))
    longest = training[max(range(len(training)), key=training["length"].__getitem__)]

    def collate(rows: list[dict]) -> dict[str, Tensor]:
        batch = tokenizer.pad({"input_ids": [row["input_ids"] for row in rows]}, return_tensors="pt")
        names = ("input_ids", "attention_mask")
        return {name: batch[name] for name in names} | {"labels": torch.tensor([row["labels"] for row in rows])}

    classes = 1 + max(training["labels"])
    words = answers.words(source, dataset) if has_question else None
    splits = {name: rows.select(range(min(measured or len(rows), len(rows)))) for name, rows in splits.items()}
    ordered = [_by_length(splits[name]) for name in ("validation", "test")]
    return Task(training, *ordered, collate, classes, longest, order="group_by_length", words=words)


def _rows(dataset: str, data: str) -> dict[str, Dataset]:
    """The splits "train", "test" and, where there is one, "validation"."""
    if Path(data).is_dir() and data:
        files = {file.stem: str(file) for file in sorted(Path(data).glob("*.parquet"))}
        if not {"train", "test"} <= files.keys():
            raise ValueError(
                f"`data` must be a folder with train.parquet and test.parquet, {data!r} has {sorted(files)}; give "
                "another."
            )
        return datasets.load_dataset("parquet", data_files=files)
    if not data and dataset not in HUB:
        raise ValueError(
            f"`dataset` must be one of {', '.join(HUB)}, or come with a `data` folder or Hub id, got {dataset!r}."
        )
    try:
        return datasets.load_dataset(data or HUB[dataset])
    except OSError as error:
        raise ValueError(
            f"`data` must be a folder with train.parquet and test.parquet, or a Hub id that can be reached, got "
            f"{data or HUB[dataset]!r}: {' '.join(str(error).split())[:200]}"
        ) from None


def _tokenized(rows: Dataset, tokenizer: Callable, length: int, question: str) -> Dataset:
    """The question comes after the sentence, which alone is cut."""
    column = next((name for name in SENTENCE if name in rows.column_names), None)
    if column is None:
        raise ValueError(f"The data must have a column {' or '.join(SENTENCE)}, got {', '.join(rows.column_names)}.")
    numbers = tokenizer(list(rows[column]), truncation=True, max_length=length)["input_ids"]
    if question:
        asked = tokenizer(question, add_special_tokens=False)["input_ids"]
        numbers = [each + asked for each in numbers]
    columns = {"input_ids": numbers, "labels": list(rows["label"]), "length": [len(each) for each in numbers]}
    return Dataset.from_dict(columns)


def _by_length(rows: Dataset) -> Dataset:
    """Short sentences first, so that little is padded where they are read in order."""
    return rows.select(sorted(range(len(rows)), key=rows["length"].__getitem__))


def _source(settings: Settings) -> str:
    """Where the weights and the tokenizer of the base are."""
    return settings.weights or settings.base


class SentenceClassifier(nn.Module):
    """An encoder, a vector for the sentence, and a linear head.

    The vector is the mean of the tokens' where the encoder has no pooler, and what its pooler makes of the first token
    otherwise.
    """

    def __init__(self, encoder: nn.Module, classes: int):
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.config.hidden_size, classes)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        outputs = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        vector = outputs.pooler_output
        if vector is None:
            share = attention_mask / attention_mask.sum(1, keepdim=True)  # [batch, tokens]
            vector = (outputs.last_hidden_state * share[..., None]).sum(1)
        logits = self.classifier(vector)
        loss = None if labels is None else cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def base_model(settings: Settings, classes: int) -> nn.Module:
    """The pretrained model under a new head that is drawn from the seed, or a language model that answers."""
    torch.manual_seed(settings.seed)
    if settings.pooling == "answer":
        return answers.answering_model(_source(settings), settings.dataset)
    pooled = {"add_pooling_layer": settings.pooling == "first"}
    return SentenceClassifier(AutoModel.from_pretrained(_source(settings), **pooled), classes)
