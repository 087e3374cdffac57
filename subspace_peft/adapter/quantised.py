"""Quantised: a Linear of bitsandbytes or torchao, whose stored weight is not read to run it with an adapter.

    y = base(x) + x (P theta_d)^T

Its tensors have the names and shapes of the plain Linear, so P is the same, and an adapter fits both bases. Functions
that take a layer take a SubspaceLayer whose base module is quantised.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import get_bnb_param_type
from peft.utils.quantization_utils import QuantizationBackend, resolve_quantization_backend
from torch import Tensor, nn
from torch.nn import functional as F


PLAIN = nn.Linear(1, 1, bias=False, device="meta")
"""A Linear that stands for any other where only the kind of operation matters."""


def is_quantised(tensor: Tensor | None) -> bool:
    """Whether bitsandbytes or torchao made this tensor."""
    kind = type(tensor)
    if kind in (Tensor, nn.Parameter):  # also where torch.compile cannot follow the rest
        return False
    return bool(get_bnb_param_type(tensor)) or kind.__module__.startswith("torchao.")


def is_quantised_linear(module: nn.Module) -> bool:
    """Whether the module computes what a Linear does, from a quantised weight."""
    if not isinstance(module, nn.Linear) or not is_quantised(module._parameters.get("weight")):
        return False
    forward = type(module).forward
    return forward is nn.Linear.forward or forward.__module__.startswith("bitsandbytes.")


def backend_of(module: nn.Module) -> QuantizationBackend | None:
    """What PEFT knows of the kind of quantisation; None for other modules."""
    if not is_quantised_linear(module):
        return None
    return resolve_quantization_backend(module, get_apply_tensor_subclass=_refuse_to_quantise)


def _refuse_to_quantise():
    raise ValueError("A merged weight must stay as it is, but is to be quantised again; merge into a plain model.")


def operator(module: nn.Module) -> nn.Module:
    """The module, or a plain one of the same kind of operation if it is quantised."""
    return PLAIN if is_quantised_linear(module) else module


def shape_of(module: nn.Module, path: str) -> tuple[int, ...]:
    """The shape of a parameter, however it is stored."""
    if path == "weight" and is_quantised_linear(module):
        return module.out_features, module.in_features
    return tuple(getattr(module, path).shape)


def dequantised(module: nn.Module) -> Tensor:
    """The weight [rows, columns] that the module computes with, in the dtype that its library gives it."""
    weight, backend = module.weight, backend_of(module)
    if get_bnb_param_type(weight) and weight.is_floating_point() and weight.shape == shape_of(module, "weight"):
        return weight.detach()  # bitsandbytes quantises it when it is moved to a device, or at every use
    if _is_packed(weight):
        return _unpacked(weight)
    return backend.get_base_weight(module).detach()


def _is_packed(weight: Tensor) -> bool:
    return getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False)


def _unpacked(weight: Tensor) -> Tensor:
    """The weight of a Linear4bit that bitsandbytes has packed for a CPU, at an evaluation without gradients.

    PEFT reads it as if it were not packed, and what bitsandbytes unpacks has its scales in another order.
    """
    from bitsandbytes import functional

    state = copy.copy(weight.quant_state)
    scales, state.original_nested = state.absmax.T.reshape(-1).float(), False
    packed, state = functional._convert_weight_packed_for_cpu_inverse(weight.data, state)
    state.absmax = scales
    return functional.dequantize_4bit(packed, state)


def float_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of what a model does not quantise, of which merged weights are."""
    modules = (module for module in model.modules() if not is_quantised_linear(module))
    tensors = (tensor for module in modules for tensor in module.parameters(recurse=False))
    floats = (tensor.dtype for tensor in tensors if tensor.is_floating_point() and not is_quantised(tensor))
    return next(floats, torch.get_default_dtype())


# --------------------------------------------------------------------------------------------- the forward of a layer


def run(x: Tensor, increments: dict[str, Tensor]) -> Tensor:
    """x (P theta_d)^T plus the increment to the bias, in the dtype of x or of autocast."""
    weight, bias = increments.get("weight"), increments.get("bias")
    bias = bias if bias is None else bias.to(x.dtype)
    return bias if weight is None else F.linear(x, weight.to(x.dtype), bias)


def output_of(module: nn.Module, forward: Callable, x: Tensor) -> Tensor:
    """forward(x) of a quantised module, with a gradient to x where its library gives none.

    torchao gives none through quantised activations, bitsandbytes none where it packed the weight for a CPU.
    """
    with torch.set_grad_enabled(torch.is_grad_enabled() and not _is_packed(module.weight)):
        output = forward(x)
    if not torch.is_grad_enabled() or not x.requires_grad or output.requires_grad:
        return output
    return _Through.apply(x, output, module)


class _Through(torch.autograd.Function):
    """x, the output of a quantised module -> that output, with the gradient g W of x."""

    @staticmethod
    def forward(ctx, x, output, module):
        ctx.module, ctx.dtype = module, x.dtype
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad):
        return (grad @ dequantised(ctx.module).to(grad.dtype)).to(ctx.dtype), None, None


# ---------------------------------------------------------------------------------------------- the weight of a layer


def entries(layer: BaseTunerLayer) -> Tensor:
    """The weight of the base module, in the dtype of what the model does not quantise."""
    return dequantised(layer.base_layer).to(layer.vectors.float_dtype)


def like(layer: BaseTunerLayer) -> Tensor:
    """A tensor with the shape and dtype of `entries`, which are not made for it."""
    return torch.empty(shape_of(layer.base_layer, "weight"), dtype=layer.vectors.float_dtype, device="meta")


def plain(layer: BaseTunerLayer, weight: Tensor) -> nn.Linear:
    """A plain Linear with this weight and a copy of the bias of the base module."""
    base = layer.base_layer
    linear = nn.Linear(base.in_features, base.out_features, bias=False, device="meta").train(base.training)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if base.bias is not None:
        linear.bias = nn.Parameter(base.bias.detach().to(weight.dtype, copy=True), requires_grad=False)
    return linear


def dequantise(layer: BaseTunerLayer) -> None:
    """Put a plain Linear in the place of a quantised base module, for adapters to be merged into."""
    base = layer.base_layer
    if is_quantised_linear(base):
        layer.base_layer = plain(layer, entries(layer))
        layer.quantised_base = [base]  # in a list: no second module of the model


def restore(layer: BaseTunerLayer) -> None:
    """Put the quantised base module back, on the device of what took its place."""
    for base in layer.quantised_base:
        device = layer.base_layer.weight.device
        layer.base_layer = base if base.weight.device == device else base.to(device)
    layer.quantised_base = []
