"""Full space: the weights around a basis, made trainable, for P+-BFGS."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .quantised import is_quantised
from .walk import find_vectors, named_layers


Lift = Callable[[Tensor], list[Tensor]]


def full_space(model: nn.Module, adapter_name: str = "default") -> tuple[list[nn.Parameter], Lift]:
    """Make the target tensors of an adapter trainable, and return them with the map P from the subspace to them.

        theta = weights + lift(theta_d),    lift: x [d] -> P x, one tensor for each weight, in its shape

    The columns of P are orthonormal. So if g is the gradient of the weights, that of theta_d is P^T g, and
    g - lift(P^T g) is the part of g outside the subspace, which PPlusBFGS needs:

        weights, lift = full_space(model)
        optimizer = PPlusBFGS([theta_d], weights, lift)

    Training then changes the base too. The adapter's file holds only theta_d and P, which give another model on the
    original base, so save `model.merge_and_unload()`. Other adapters of the model act on the changed base.

    Returns:
        Each target tensor once, and lift.

    Raises:
        ValueError: if P is not a basis of orthonormal columns over the weights, or the base is in half precision.
    """
    config = model.peft_config[adapter_name]
    if (config.projection, config.coordinates, config.normalization) != ("basis", "weight", "columns"):
        raise ValueError(
            "`full_space` must be given an adapter of orthonormal columns over the weights: projection='basis', "
            f"coordinates='weight', normalization='columns', got {config.projection!r}, {config.coordinates!r}, "
            f"{config.normalization!r}."
        )
    owners = {
        coordinates.name: (coordinates, getattr(layer.base_layer, path))
        for _, layer in named_layers(model)
        for path, coordinates in layer.coordinates.get(adapter_name, {}).items()
    }
    weights = [weight for _, weight in owners.values()]
    for name, (_, weight) in owners.items():
        if is_quantised(weight) or weight.dtype not in (torch.float32, torch.float64):
            kind = "quantised" if is_quantised(weight) else weight.dtype
            raise ValueError(
                f"The base must be in float32 or float64 to train, `{name}` is {kind}; convert it, or load it so."
            )
    scale = find_vectors(model).scales[adapter_name]

    @torch.no_grad()
    def lift(x: Tensor) -> list[Tensor]:
        z = x * scale.to(x.device) if isinstance(scale, Tensor) else x * scale
        return [coordinates.increment(z.to(weight.device)).to(weight.dtype) for coordinates, weight in owners.values()]

    for weight in weights:
        weight.requires_grad_(True)
    return weights, lift
