"""Embeddings: those that PEFT adds to an adapter's file, of a resized vocabulary or because it is told to."""

from __future__ import annotations

from itertools import chain

import torch
from peft import PeftConfig
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .layer import SubspaceLayer
from .walk import plain


EMBEDDINGS = ("get_input_embeddings", "get_output_embeddings")
BESIDE = ":beside:"


def embeddings(model: nn.Module, getter: str) -> nn.Module | None:
    """What one of EMBEDDINGS returns; None where that raises an error, as in models of images and speech."""
    try:
        return getattr(model, getter, lambda: None)()
    except NotImplementedError:
        return None


@torch.no_grad()
def offer(model: nn.Module, config: PeftConfig, state_dict: dict[str, Tensor]) -> None:
    """Prepare PEFT's copy of the state dict, from which PEFT may add both embeddings to the file, as the base's.

    With `save_embedding_layers="auto"` PEFT adds them if the vocabulary is not that of the base on the Hub. It would
    also do so for every adapter that targets one, except for those that train single tokens, because they are to be
    small. Ours are to be small too, so the config says that it trains the tokens of none. And PEFT would add only the
    targeted one of two embeddings: the other one is laid beside it, and gets its own key back by `key_in_file`.
    """
    config.trainable_token_indices = {}
    names = {module: name.removeprefix("_fsdp_wrapped_module.") for name, module in model.named_modules()}
    found = [module for getter in EMBEDDINGS if (module := embeddings(model, getter)) in names]
    targets = [module for module in found if isinstance(module, SubspaceLayer)]
    for layer in targets:
        for path, increment in layer.increments(layer.merged_adapters).items():
            key = f"{names[layer]}.base_layer.{path}"
            state_dict[key] = layer.replaced_origins.get(path, state_dict[key] - increment)
    for other in found:
        if targets and not isinstance(other, (SubspaceLayer, AuxiliaryTrainingWrapper)):
            for key in [key for key in state_dict if key.startswith(f"{names[other]}.")]:
                state_dict[f"{names[targets[0]]}.base_layer.{BESIDE}{key}"] = state_dict[key]


def key_in_file(key: str) -> str:
    """The key of a tensor that PEFT took, without what `offer` put in front of it."""
    return key.rpartition(BESIDE)[2]


def keys_in_model(model: nn.Module) -> dict[str, str]:
    """The key of each tensor of the model by the key it has where no adapter wraps a module around it."""
    named = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    return {plain(key): key for key, _ in chain(*named)}
