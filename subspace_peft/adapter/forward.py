"""Forward: the output of a base module whose parameters are origin + P theta_d, in one of four ways.

- Any module runs with the moved tensors in place of its parameters; so does one that was given a forward of its own.
- A module in half precision whose operation is linear in its parameters: op(x, W_0) + op(x, P theta_d), because
  W_0 + P theta_d would round P theta_d away. So does a quantised Linear, whose W_0 nobody can add to.
- A projection that has a product runs x through its steps, without P theta_d, or makes the rows that an embedding
  looks up, if that is cheaper for as many tokens as x has, or if the base's weight is in half precision or quantised.
- Low-rank coordinates: x runs through the two factors in turn, without their product, if the module has such an
  operation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from accelerate.utils import align_module_device
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..coordinates import LowRank, Weight, factored
from . import quantised
from .forming import Form, formed
from .modules import (
    MATRICES,
    OF_ACCELERATE,
    autocast_dtype,
    has_hooks,
    has_own_forward,
    has_stand_in,
    in_place_of,
    run_with,
)


def adapted(layer: BaseTunerLayer, adapters: list[str], *args, **kwargs):
    """The output of a SubspaceLayer's base module as these adapters move it."""
    base = layer.base_layer
    low_rank = [adapter for adapter in adapters if _runs_factored(layer, adapter)]
    multiplied = [adapter for adapter in adapters if _is_multiplied(layer, adapter, *args, **kwargs)]
    is_sum = _adds_to_output(layer) or len(low_rank) + len(multiplied) == len(adapters)
    if not is_sum or (has_own_forward(base) and not quantised.is_quantised_linear(base)):
        with align_module_device(base):  # offloaded weights are read before the base module's own forward
            return _run(base, base, _moved_forms(layer, adapters), {}, *args, **kwargs)
    forward_name = OF_ACCELERATE if OF_ACCELERATE in base.__dict__ else "forward"
    total = partial(_sum_of_outputs, layer, getattr(base, forward_name), adapters, low_rank, multiplied)
    if forward_name == "forward" and not has_hooks(base):
        return total(*args, **kwargs)
    with in_place_of(base, {forward_name: total}):  # its hooks see the input and the output of all of it, once
        return base(*args, **kwargs)


def _adds_to_output(layer: BaseTunerLayer) -> bool:
    base = layer.base_layer
    is_half = layer.is_linear and base.weight.dtype in (torch.float16, torch.bfloat16)
    return is_half or quantised.is_quantised_linear(base)


def _runs_factored(layer: BaseTunerLayer, adapter: str) -> bool:
    coordinates = layer.coordinates[adapter].get("weight")
    return isinstance(coordinates, LowRank) and factored.operation(quantised.operator(layer.base_layer)) is not None


def _is_multiplied(layer: BaseTunerLayer, adapter: str, *args, **kwargs) -> bool:
    """Whether x runs through the steps of the adapter's projection."""
    coordinates = layer.coordinates[adapter].get("weight")
    if not isinstance(coordinates, Weight) or not coordinates.projections[""].has_product:
        return False
    projection, x = coordinates.projections[""], args[0] if args else next(iter(kwargs.values()))
    if not (isinstance(x, Tensor) and x.dim()) or x.is_nested:
        return False
    if _looks_up(layer):
        has_its_padding = layer.base_layer.padding_idx is None or coordinates.padding is not None
        return has_its_padding and (_adds_to_output(layer) or projection.is_look_up_cheaper(x.numel()))
    if coordinates.padding is not None or type(quantised.operator(layer.base_layer)).forward not in MATRICES:
        return False
    trains = torch.is_grad_enabled() and layer.subspace_peft_theta_d[adapter].requires_grad
    tokens = x.shape[:-1].numel()
    return _adds_to_output(layer) or projection.is_product_cheaper(tokens, trains)


def _looks_up(layer: BaseTunerLayer) -> bool:
    """Whether the base module returns rows of its weight, and their gradient is that of the outputs."""
    base = layer.base_layer
    return type(base).forward is nn.Embedding.forward and not base.scale_grad_by_freq


def _sum_of_outputs(
    layer: BaseTunerLayer,
    forward: Callable,
    adapters: list[str],
    low_rank: list[str],
    multiplied: list[str],
    *args,
    **kwargs,
) -> Tensor:
    """op(x, W_0) + the sum of op(x, P theta_d) over the adapters; without W_0 where one of them replaces it.

    Args:
        forward: The operation of the base module.
        low_rank: Those of the adapters whose increments run through their factors.
        multiplied: Those whose increments run through the steps of their projection.
    """
    base, operator = layer.base_layer, quantised.operator(layer.base_layer)
    x = args[0] if args else next(iter(kwargs.values()))
    factors = {}
    for adapter in low_rank:
        z = layer.normalised(adapter)
        z = z.to(torch.promote_types(z.dtype, operator.weight.dtype))
        factors[adapter] = layer.coordinates[adapter]["weight"].factors(z)
    replacing = [adapter for adapter in low_rank if layer.coordinates[adapter]["weight"].replaces]
    if not replacing:
        output = forward(*args, **kwargs) if operator is base else quantised.output_of(base, forward, x)
    else:
        output = factored.run(operator, x, *factors.pop(replacing[0]), getattr(base, "bias", None))
    for left, right in factors.values():
        output = output + factored.run(operator, x, left, right).to(output.dtype)
    for adapter in multiplied:
        z = layer.normalised(adapter)
        z = z.to(torch.promote_types(z.dtype, operator.weight.dtype))
        coordinates = layer.coordinates[adapter]["weight"]
        if _looks_up(layer):
            output = coordinates.look_up(x, z, output)
        else:
            output = coordinates.product(x, z, MATRICES[type(operator).forward], output)
    for increment in layer.increments(multiplied, skip=("weight",)).values():  # of the bias
        output = output + increment.to(output.dtype)
    by_forming = [adapter for adapter in adapters if adapter not in (*low_rank, *multiplied)]
    if by_forming:
        output = output + _output_of_increments(layer, forward, by_forming, *args, **kwargs).to(output.dtype)
    return output


def _moved_forms(layer: BaseTunerLayer, adapters: list[str]) -> dict[str, Form]:
    """How the parameters are formed; of a product in the dtype of autocast, which would hold a copy of its own."""
    base, forms = layer.base_layer, {}
    for path, zs in layer.zs(adapters).items():
        origin = getattr(base, path)
        dtype = autocast_dtype(base, origin) if layer.is_linear and path == "weight" else None
        forms[path] = layer.form(path, zs, origin, dtype)
    return forms


def _output_of_increments(layer: BaseTunerLayer, forward: Callable, adapters: list[str], *args, **kwargs) -> Tensor:
    """op(x, P theta_d) of a module that is linear in its parameters."""
    base, zs_of = layer.base_layer, layer.zs(adapters)
    if quantised.is_quantised_linear(base):
        x = args[0] if args else next(iter(kwargs.values()))
        dtypes = {"weight": autocast_dtype(base, x) or x.dtype, "bias": x.dtype}
        with formed(base, {path: layer.form(path, zs, None, dtypes[path]) for path, zs in zs_of.items()}) as tensors:
            return quantised.run(x, tensors)
    parameters = dict(base.named_parameters(recurse=False))
    forms = {path: layer.form(path, zs, None, parameters[path].dtype) for path, zs in zs_of.items()}
    zeros = {path: torch.zeros_like(parameter) for path, parameter in parameters.items() if path not in forms}
    return _run(base, forward, forms, zeros, *args, **kwargs)


def _run(
    base: nn.Module, forward: Callable, forms: dict[str, Form], others: dict[str, Tensor], *args, **kwargs
) -> Tensor:
    """What `forward` gives with tensors of these forms, and these others, in place of the base's parameters."""
    if torch.compiler.is_compiling() and has_stand_in(base):
        tensors = {**others, **{path: form() for path, form in forms.items()}}  # torch 2.7 cannot trace |
        return run_with(base, tensors, *args, **kwargs)
    with formed(base, forms, others):
        return forward(*args, **kwargs)
