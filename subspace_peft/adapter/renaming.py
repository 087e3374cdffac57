"""Renaming: from the names of a base model to those of the model that an adapter was made for; how names are given.

P is drawn from names, so a model whose modules were renamed since has another P unless it is read by its old names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from peft import PeftConfig
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming


def check_names(field: str, value: object, may_be_expression: bool) -> None:
    """Check how a field of a config names modules or parameters.

    Raises:
        ValueError: if it is neither a list of names nor, where it may be one, a regular expression.
    """
    rule = "a list of names" + (" or a regular expression" if may_be_expression else "")
    wrong = f"`{field}` must be {rule}, got {value!r}"
    if isinstance(value, str) and may_be_expression:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"{wrong} ({error}); put a backslash before what stands for itself.") from error
    elif value is not None and not are_names(value):
        raise ValueError(f"{wrong}; write names as strings, such as ['0', 'q_proj'].")


def are_names(value: object) -> bool:
    is_collection = isinstance(value, Collection) and not isinstance(value, (str, bytes))
    return is_collection and all(isinstance(name, str) for name in value)


@dataclass(frozen=True)
class Substitutions:
    """Regular expressions in the place of which other text comes; the first that matches is applied, as in PEFT.

    Raises:
        ValueError: if they are no dictionary of regular expressions.
    """

    patterns: dict[str, str]

    def __post_init__(self):
        try:
            for pattern, replacement in self.patterns.items():
                re.sub(pattern, replacement, "")
        except (AttributeError, TypeError, re.error) as error:
            raise ValueError(
                "`renamed` must map regular expressions for names of this model to what took their place in the model "
                f"that the adapter was made for, got {self.patterns!r} ({error}); write it as "
                r"{r'^model\.language_model\.': 'language_model.model.'}."
            ) from error

    def __call__(self, name: str) -> str:
        for pattern, replacement in self.patterns.items():
            name, count = re.subn(pattern, replacement, name)
            if count:
                break
        return name


UNCHANGED = Substitutions({})


@dataclass(frozen=True)
class CheckpointNames:
    """The names in checkpoints older than this version of transformers, which renames them when it reads one."""

    steps: tuple[WeightRenaming, ...]

    def __call__(self, name: str) -> str:
        for step in self.steps:
            name, _ = step.rename_source_key(name)
        return name


Renaming = Substitutions | CheckpointNames


def renamings(config: PeftConfig, model: nn.Module) -> Iterator[Renaming]:
    """The names to try for a model, in this order; a fingerprint tells which are right, and without one the first are.

    They are those that the config says, the model's own, and those of older checkpoints.
    """
    if config.renamed:
        yield Substitutions(config.renamed)
    yield UNCHANGED
    if isinstance(model, PreTrainedModel):
        steps = reversed(get_model_conversion_mapping(model, add_legacy=False))
        yield CheckpointNames(tuple(s.reverse_transform() for s in steps if isinstance(s, WeightRenaming)))
