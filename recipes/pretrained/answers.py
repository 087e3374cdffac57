"""A language model that answers: the class of a sentence is its next word after a question, no head is new."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput


class Question(NamedTuple):
    """What is asked after a sentence, and a word for each class."""

    text: str
    words: tuple[str, ...]


QUESTIONS = {
    "sst2": Question(" It was", (" terrible", " great")),
    "subj": Question(" This is", (" subjective", " objective")),
}
"""Those of Gao, Fisch and Chen (2021, table 1), without the point at the end."""


class AnsweringModel(nn.Module):
    """The logits of the token that comes after a sentence with its question. [batch, vocabulary]

    Sentences are padded at their start. The loss is that of the class's word among all tokens, as in supervised
    fine-tuning on completions of one token.
    """

    def __init__(self, language_model: nn.Module, words: list[int]):
        super().__init__()
        self.language_model = language_model
        self.words = words

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        logits = self.language_model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1]
        words = torch.tensor(self.words, device=logits.device)
        loss = None if labels is None else cross_entropy(logits, words[labels])
        return SequenceClassifierOutput(loss=loss, logits=logits)


def tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Of a language model, which pads at the start."""
    made = AutoTokenizer.from_pretrained(source, padding_side="left")
    made.pad_token = made.pad_token or made.eos_token
    return made


def words(source: str, dataset: str) -> list[int]:
    """The first token of the word for each class.

    Raises:
        ValueError: if two are the same.
    """
    known = tokenizer(source)
    found = [known(word, add_special_tokens=False)["input_ids"][0] for word in QUESTIONS[dataset].words]
    if len(set(found)) < len(found):
        raise ValueError(
            f"The answers {', '.join(QUESTIONS[dataset].words)} must begin with different tokens, {source!r} has "
            f"{found}; take another base."
        )
    return found


def answering_model(source: str, dataset: str) -> AnsweringModel:
    language_model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    return AnsweringModel(language_model, words(source, dataset))
