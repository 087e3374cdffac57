"""Forward: the output of a base module whose parameters are origin + P theta_d, in one of three ways.

- Any module runs with the moved tensors in place of its parameters.
- A module in half precision whose operation is linear in its parameters: op(x, W_0) + op(x, P theta_d), because
  W_0 + P theta_d would round P theta_d away. So does a quantised Linear, whose W_0 nobody can add to.
- Low-rank coordinates: x runs through the two factors in turn, without their product, if the module has such an
  operation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from ..coordinates import LowRank, factored
from . import quantised
from .modules import in_place_of


def adapted(layer: BaseTunerLayer, adapters: list[str], *args, **kwargs):
    """The output of a SubspaceLayer's base module as these adapters move it."""
    low_rank = [adapter for adapter in adapters if _runs_factored(layer, adapter)]
    base = layer.base_layer
    if not _adds_to_output(layer) and len(low_rank) < len(adapters):
        with in_place_of(base, layer.moved(adapters)):
            return base(*args, **kwargs)
    total = partial(_sum_of_outputs, layer, base.forward, adapters, low_rank)
    if not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks):
        return total(*args, **kwargs)
    with in_place_of(base, {"forward": total}):  # its hooks see the input and the output of all of it, once
        return base(*args, **kwargs)


def _adds_to_output(layer: BaseTunerLayer) -> bool:
    base = layer.base_layer
    is_half = layer.is_linear and base.weight.dtype in (torch.float16, torch.bfloat16)
    return is_half or quantised.is_quantised_linear(base)


def _runs_factored(layer: BaseTunerLayer, adapter: str) -> bool:
    coordinates = layer.coordinates[adapter].get("weight")
    return isinstance(coordinates, LowRank) and factored.operation(quantised.operator(layer.base_layer)) is not None


def _sum_of_outputs(
    layer: BaseTunerLayer, forward: Callable, adapters: list[str], low_rank: list[str], *args, **kwargs
) -> Tensor:
    """op(x, W_0) + the sum of op(x, P theta_d) over the adapters; without W_0 where one of them replaces it.

    Args:
        forward: The operation of the base module.
        low_rank: Those of the adapters whose increments run through their factors.
    """
    base, operator = layer.base_layer, quantised.operator(layer.base_layer)
    x = args[0] if args else next(iter(kwargs.values()))
    factors = {}
    for adapter in low_rank:
        z = layer.normalised(adapter)
        z = z.to(torch.promote_types(z.dtype, operator.weight.dtype))
        factors[adapter] = layer.coordinates[adapter]["weight"].factors(z)
    replacing = next((adapter for adapter in low_rank if layer.coordinates[adapter]["weight"].replaces), None)
    if replacing is None:
        output = forward(*args, **kwargs) if operator is base else quantised.output_of(base, forward, x)
    else:
        output = factored.run(operator, x, *factors.pop(replacing), getattr(base, "bias", None))
    for left, right in factors.values():
        output = output + factored.run(operator, x, left, right).to(output.dtype)
    formed = [adapter for adapter in adapters if adapter not in low_rank]
    if formed and operator is not base:
        output = output + quantised.run(x, layer.increments(formed)).to(output.dtype)
    elif formed:
        increments = layer.increments(formed)
        tensors = {
            path: increments[path].to(parameter.dtype) if path in increments else torch.zeros_like(parameter)
            for path, parameter in base.named_parameters(recurse=False)
        }
        with in_place_of(base, tensors):
            output = output + forward(*args, **kwargs)
    return output
