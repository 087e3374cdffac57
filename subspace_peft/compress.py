"""Compressing: a model of replaced weights as a plain model whose modules really are two smaller ones."""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import nn

from .adapter_file import find_vectors, named_layers
from .factored import smaller


@torch.no_grad()
def compress(model: PeftModel, adapter_name: str = "default") -> nn.Module:
    """The plain model in which a module of weight B A is an nn.Sequential of two: rank (rows + columns) entries.

    It has no adapters, none of the weights W_0 that were replaced, and the adapter's outputs to rounding. The model
    that was given is taken apart for it, as by `merge_and_unload`.

    Raises:
        ValueError: if the adapter replaces no weight, a replaced weight is tied, or an adapter is merged.
    """
    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs or not getattr(configs[adapter_name], "replace_weight", False):
        raise ValueError(
            f"`adapter_name` must be that of an adapter with replace_weight=True, got {adapter_name!r}; the model has "
            f"{', '.join(configs) or 'none'}; merge_and_unload() is for those that add to a weight."
        )
    base = model.get_base_model()
    layers = {name: layer for name, layer in named_layers(base) if layer.coordinates.get(adapter_name)}
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"No adapter must be merged when a model is compressed, `{name}` has one; unmerge it.")
        if layer.shared[adapter_name] or list(layers.values()).count(layer) > 1:
            raise ValueError(
                f"A tied weight cannot become two modules in one place alone, as that of `{name}` would; use "
                "merge_and_unload(), or leave it out of `target_modules`."
            )
    z = find_vectors(model).normalised(adapter_name)
    parts = {}
    for name, layer in layers.items():
        left, right = layer.coordinates[adapter_name]["weight"].factors(z.to(layer.base_layer.weight.device))
        parts[name] = smaller(layer.base_layer, left, right)
    plain = model.merge_and_unload(adapter_names=[adapter_name])
    for name, module in parts.items():
        plain.set_submodule(name, module)
    return plain
