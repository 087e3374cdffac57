"""Caches: values that a module computes from weights and keeps while it is in evaluation mode.

Such a module has a `train` of its own, which drops or computes them when the mode changes, as the attention of LeViT
does with its biases. At the next forward theta_d may have moved the weights, or another adapter may act.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


WITHOUT_CACHE = (nn.Module.train, PreTrainedModel.train)


def has_cache(module: nn.Module) -> bool:
    """Whether the module may keep values: a root has the class of a base model among its own."""
    return getattr(type(module), "plain", type(module)).train not in WITHOUT_CACHE


def renew(module: nn.Module) -> None:
    """In evaluation mode, have the module drop what it keeps, or compute it anew."""
    if module.training:
        return
    modes = [(each, each.training) for each in module.modules()]
    module.train(True)
    module.train(False)
    for each, training in modes:
        each.training = training
