"""Compressing: a model of replaced weights as a plain model with two smaller modules in the place of each."""

from __future__ import annotations

import torch
from accelerate.utils import align_module_device
from peft import PeftModel
from torch import nn

from ..coordinates.factored import Factored, smaller
from .layer import SubspaceLayer
from .quantised import is_quantised
from .walk import find_vectors, named_layers, plain


@torch.no_grad()
def compress(model: PeftModel, adapter_name: str = "default") -> nn.Module:
    """Return a plain model in which each module with weight B A is an nn.Sequential of two smaller modules.

    Such a pair has rank (rows + columns) weights in place of rows columns. The plain model has the adapter's outputs
    to rounding, no adapters and no replaced W_0, and all its parameters are trainable. `model` is taken apart for it,
    as by `merge_and_unload`.

    Raises:
        ValueError: before anything is changed, if the adapter replaces no weight, another adapter is active or
            merged, or a replaced weight is tied.
    """
    layers = _checked(model, adapter_name)
    z = find_vectors(model).normalised(adapter_name)
    parts: dict[str, Factored] = {}
    for name, layer in layers.items():
        with align_module_device(layer.base_layer):  # its weights may be offloaded
            left, right = layer.coordinates[adapter_name]["weight"].factors(z.to(layer.base_layer.weight.device))
            parts[plain(name)] = smaller(layer.base_layer, left, right)
    compressed = model.merge_and_unload(adapter_names=[adapter_name])
    for name, module in parts.items():
        compressed.set_submodule(name, module)
    return compressed.requires_grad_(True)


def _checked(model: PeftModel, adapter: str) -> dict[str, SubspaceLayer]:
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"`model` must be a PeftModel, got {type(model).__name__}; save the adapter, and load it with "
            "PeftModel.from_pretrained(base, folder)."
        )
    configs = model.peft_config
    if adapter not in configs or not getattr(configs[adapter], "replace_weight", False):
        raise ValueError(
            f"`adapter_name` must be that of an adapter with replace_weight=True, got {adapter!r}; the model has "
            f"{', '.join(configs)}; for an adapter that adds to the weights use merge_and_unload()."
        )
    if list(model.active_adapters) != [adapter]:
        raise ValueError(
            f"The adapter to compress must be the only active one, got {model.active_adapters}; call "
            f"set_adapter({adapter!r}), or merge the others into the base first."
        )
    if quantised := [name for name, parameter in model.get_base_model().named_parameters() if is_quantised(parameter)]:
        raise ValueError(
            f"A model must be unquantised to be compressed, `{plain(quantised[0])}` is not; load the adapter onto the "
            "unquantised base, which it fits, and compress that."
        )
    layers = {name: layer for name, layer in named_layers(model.get_base_model()) if layer.coordinates.get(adapter)}
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(
                f"A model must have no merged adapter to be compressed, `{name}` has one; call unmerge_adapter()."
            )
        if layer.merged_elsewhere[adapter] or list(layers.values()).count(layer) > 1:
            raise ValueError(
                f"A weight must be in one module alone to become two modules, that of `{name}` is tied; use "
                "merge_and_unload(), or leave it out of `target_modules`."
            )
    return layers
