"""Saved whole: the modules of `modules_to_save`, which PEFT copies for each adapter and trains beside it."""

from __future__ import annotations

import copy
import re
from itertools import accumulate

from peft import PeftConfig, TaskType
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from .layer import SubspaceLayer


HEADS = {TaskType.TOKEN_CLS: ("classifier", "score"), TaskType.QUESTION_ANS: ("qa_outputs",)}
"""The task -> the modules that PEFT trains whole, and writes into the user's config once the model is wrapped."""


def with_heads(config: PeftConfig) -> PeftConfig:
    """A user's config, as a copy with the names that PEFT will write into the user's, so that they are no targets."""
    if config.inference_mode or config.task_type not in HEADS:
        return config
    config = copy.copy(config)
    config.modules_to_save = [*(config.modules_to_save or ()), *HEADS[config.task_type]]
    return config


def names_saved_whole(config: PeftConfig) -> list[str]:
    """The names in `modules_to_save`, and those that PEFT adds to them for the task."""
    of_task = SEQ_CLS_HEAD_NAMES if config.task_type == TaskType.SEQ_CLS else HEADS.get(config.task_type, ())
    return [*(config.modules_to_save or ()), *of_task]


def is_saved_whole(name: str, config: PeftConfig) -> bool:
    """Whether the module is, or lies in, one of `modules_to_save`: all of their copies trains.

    PEFT copies each module whose name ends in one of the names, but takes them as expressions where it looks for
    targets.
    """
    return any(
        re.match(rf"(^|.*\.){saved}($|\..*)", name)
        or any(outer.endswith(saved) for outer in accumulate(name.split("."), "{}.{}".format))
        for saved in config.modules_to_save or ()
    )


def check_saved(model: nn.Module, config: PeftConfig) -> None:
    """Check that no adapter of the model targets a module of `modules_to_save`.

    Raises:
        ValueError: if one does; PEFT would find out when half of the adapter is in its place.
    """
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, SubspaceLayer) and any(name.endswith(saved) for saved in config.modules_to_save or ()):
            raise ValueError(
                f"`modules_to_save` must name modules that no adapter of the model targets, `{name}` is a target of "
                f"{', '.join(map(repr, module.coordinates))}; leave it out, or target it too."
            )


def check_none_saved(model: nn.Module, adapter: str) -> None:
    """Check that an adapter to be summed saves no module whole, which would not be in the sum.

    Raises:
        ValueError: if it does.
    """
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
            raise ValueError(
                f"Adapters that save modules whole have no exact sum, {adapter!r} saves `{name}`; average their state "
                "dicts instead, or leave `modules_to_save` out."
            )
