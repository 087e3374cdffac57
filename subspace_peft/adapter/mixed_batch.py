"""Mixed batch: a batch of which each sample runs with an adapter of its own."""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from . import statistics
from .forward import adapted


def mixed_batch(layer: BaseTunerLayer, adapter_names: list[str], x: Tensor, *args, **kwargs) -> Tensor:
    """The output of a SubspaceLayer, sample i with adapter `adapter_names[i]`; "__base__" stands for no adapter.

    Raises:
        ValueError: if an adapter is merged or disabled, or input or output cannot be split into samples.
    """
    if layer.merged or layer.disable_adapters:
        raise ValueError(
            "`adapter_names` needs adapters that are neither merged nor disabled; unmerge or enable them first."
        )
    has_other_tensors = any(isinstance(argument, Tensor) for argument in (*args, *kwargs.values()))
    if not isinstance(x, Tensor) or x.shape[0] != len(adapter_names) or has_other_tensors:
        raise ValueError(
            f"`adapter_names` must have one name for each sample along dimension 0 of the input of "
            f"{type(layer.base_layer)}, got {len(adapter_names)} names; run such a batch one adapter at a time, "
            "with set_adapter."
        )
    output = None
    for name in dict.fromkeys(adapter_names):
        index = torch.tensor([i for i, other in enumerate(adapter_names) if other == name], device=x.device)
        adapters = layer.held([name])
        samples = x.index_select(0, index)
        with statistics.using(layer, adapters[-1] if adapters else None):
            if adapters:
                y = adapted(layer, adapters, samples, *args, **kwargs)
            else:
                y = layer.base_layer(samples, *args, **kwargs)
        if not isinstance(y, Tensor) or y.shape[0] != len(index):
            raise ValueError(
                f"`adapter_names` needs outputs that can be split into samples along dimension 0, those of "
                f"{type(layer.base_layer)} cannot; run such a batch one adapter at a time, with set_adapter."
            )
        output = y.new_empty(len(adapter_names), *y.shape[1:]) if output is None else output
        output = output.index_copy(0, index, y)
    return output
