"""The whole space around a subspace: the weights that a basis moves, made trainable, for P+-BFGS."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter

import torch
from torch import Tensor, nn

from .walk import find_vectors, named_layers


Lift = Callable[[Tensor], list[Tensor]]


def full_space(model: nn.Module, adapter_name: str = "default") -> tuple[list[nn.Parameter], Lift]:
    """The target tensors of an adapter, which train from now on, each once; and x [d] -> P x, shaped as they are.

    theta = weights + lift(theta_d), and the columns of lift are orthonormal: g - lift(P^T g) is the part of a gradient
    outside of the subspace, where P^T g is the gradient of theta_d. Made for

        weights, lift = full_space(model)
        optimizer = PPlusBFGS([theta_d], weights, lift)

    What trains is the base as well. The adapter's file holds theta_d and P alone and would give another model on the
    base as it was: save `model.merge_and_unload()`. Other adapters of the model move with its base.

    Raises:
        ValueError: if P is no basis of orthonormal columns over the weights in full precision.
    """
    config = model.peft_config[adapter_name]
    if (config.projection, config.coordinates, config.normalization) != ("basis", "weight", "columns"):
        raise ValueError(
            "`full_space` must be given an adapter of orthonormal columns over the weights: projection='basis', "
            f"coordinates='weight', normalization='columns', got {config.projection!r}, {config.coordinates!r}, "
            f"{config.normalization!r}."
        )
    owners = {
        coordinates.name: (coordinates, attrgetter(path)(layer.base_layer))
        for _, layer in named_layers(model)
        for path, coordinates in layer.coordinates.get(adapter_name, {}).items()
    }
    weights = [weight for _, weight in owners.values()]
    for name, (_, weight) in owners.items():
        if weight.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"The base must be in float32 or float64 to train, `{name}` is {weight.dtype}; convert it."
            )
    scale = find_vectors(model).scales[adapter_name]

    @torch.no_grad()
    def lift(x: Tensor) -> list[Tensor]:
        z = x * scale.to(x.device) if isinstance(scale, Tensor) else x * scale
        return [coordinates.increment(z.to(weight.device)).to(weight.dtype) for coordinates, weight in owners.values()]

    for weight in weights:
        weight.requires_grad_(True)
    return weights, lift
