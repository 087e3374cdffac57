"""Folding: a trained adapter as one direction and its length."""

from __future__ import annotations

import copy
from math import isfinite

import torch
from torch import nn

from ..projections import PROJECTIONS, TensorRows
from .plan import scale
from .walk import find_vectors, named_layers, unique_coordinates


@torch.no_grad()
def fold(model: nn.Module, adapter_name: str = "default") -> None:
    """Replace an adapter by the one-dimensional `basis` adapter of its increment, in place.

        new P = P theta_d / |P theta_d|: [D, 1],    new theta_d = |P theta_d|: [1]

    The outputs stay the same to rounding, and batch-norm statistics as they are. The file of an adapter in a given
    basis goes from D d numbers to D, in float32; that of a seeded one grows from d. Further training would move the
    length alone, so fold after it.

    Args:
        model: A PeftModel, or any model with a SubspaceConfig adapter in it.

    Raises:
        ValueError: if the coordinates are not `weight`, the adapter is merged, or its increment is zero or not finite.
    """
    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs or not any(adapter_name in layer.coordinates for _, layer in named_layers(model)):
        raise ValueError(
            f"`adapter_name` must be that of a SubspaceConfig adapter of the model, got {adapter_name!r}; it has "
            f"{', '.join(configs) or 'none'}."
        )
    config = configs[adapter_name]
    if config.coordinates != "weight":
        raise ValueError(
            f"Only coordinates='weight' have an increment that is one direction, {adapter_name!r} has "
            f"coordinates={config.coordinates!r}; its file is small as it is, or merge it."
        )
    if any(adapter_name in layer.merged_adapters for _, layer in named_layers(model)):
        raise ValueError(
            f"An adapter must be unmerged to be folded, {adapter_name!r} is merged; call unmerge_adapter()."
        )
    vectors, coordinates = find_vectors(model), unique_coordinates(model, adapter_name)
    z = vectors.normalised(adapter_name)
    increments = {c.name: c.increment(z).float().view(-1, 1) for c in coordinates.values()}
    length = sum(increment.double().square().sum().item() for increment in increments.values()) ** 0.5
    if length == 0 or not isfinite(length):
        raise ValueError(
            f"theta_d must move the weights to be folded, the increment of {adapter_name!r} has length {length}; "
            "train the adapter first."
        )
    config = copy.copy(config)
    config.projection, config.d, config.normalization, config.nnz_per_row = "basis", 1, "columns", None
    config.basis = config.mask = config.save_projection = config.basis_digest = config.expected_basis_digest = None
    for c in coordinates.values():
        block = TensorRows(name=c.name, n=len(increments[c.name]), d=1, given=increments.pop(c.name).div_(length))
        c.projections[""] = PROJECTIONS["basis"](block)
    theta_d = vectors.subspace_peft_theta_d[adapter_name]
    vectors.subspace_peft_theta_d[adapter_name] = nn.Parameter(theta_d.new_tensor([length]), theta_d.requires_grad)
    vectors.scales[adapter_name], vectors.joint_caches[adapter_name] = scale(config, coordinates), None
    configs[adapter_name] = config
