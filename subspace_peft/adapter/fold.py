"""Folding: a trained adapter as one direction and its length."""

from __future__ import annotations

import copy
from math import isfinite

import torch
from peft import PeftConfig
from torch import nn

from ..coordinates.base import Shape
from ..projections import PROJECTIONS, TensorRows
from .fingerprint import fingerprint
from .given_projection import Given
from .scale import normalising_scale
from .walk import find_vectors, named_layers, unique_coordinates


@torch.no_grad()
def fold(model: nn.Module, adapter_name: str = "default") -> None:
    """Replace an adapter, in place, by the one-dimensional `basis` adapter of its increment.

        new P = P theta_d / |P theta_d|: [D, 1],    new theta_d = |P theta_d|: [1]

    Outputs stay the same to rounding, and batch-norm statistics exactly. The file of an adapter in a given basis
    shrinks from D d parameters to D, in float32; the file of a seeded one grows from d to D. Further training would
    change the length alone, so fold after training.

    Args:
        model: A PeftModel, or any model with a SubspaceConfig adapter in it.

    Raises:
        ValueError: if the coordinates are not `weight`, the adapter is merged, or its increment is zero or not finite.
    """
    config = _checked_config(model, adapter_name)
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
    config.given = Given(1, {name: increment.div_(length) for name, increment in increments.items()})
    config.D = sum(map(len, increments.values()))  # a given P has rows for padding too
    config.fingerprint = fingerprint({c.name: Shape(c.shape) for c in coordinates.values()})
    for c in coordinates.values():
        c.padding = None
        rows = TensorRows(name=c.name, n=len(increments[c.name]), d=1, given=increments[c.name])
        c.projections[""], c.strength = PROJECTIONS["basis"](rows), 1.0  # it is in the increments
    theta_d = vectors.subspace_peft_theta_d[adapter_name]
    vectors.subspace_peft_theta_d[adapter_name] = nn.Parameter(theta_d.new_tensor([length]), theta_d.requires_grad)
    vectors.scales[adapter_name] = normalising_scale(config, coordinates)
    vectors.joint_caches[adapter_name] = None
    model.peft_config[adapter_name] = config


def _checked_config(model: nn.Module, adapter: str) -> PeftConfig:
    configs = getattr(model, "peft_config", {})
    if adapter not in configs or not any(adapter in layer.coordinates for _, layer in named_layers(model)):
        raise ValueError(
            f"`adapter_name` must be that of a SubspaceConfig adapter of the model, got {adapter!r}; it has "
            f"{', '.join(configs) or 'none'}."
        )
    config = configs[adapter]
    if config.coordinates != "weight":
        raise ValueError(
            f"Only coordinates='weight' have an increment in one direction, {adapter!r} has coordinates="
            f"{config.coordinates!r}; keep its file, which is small, or merge it."
        )
    if any(adapter in layer.merged_adapters for _, layer in named_layers(model)):
        raise ValueError(f"An adapter must be unmerged to be folded, {adapter!r} is merged; call unmerge_adapter().")
    return config
