"""Quantised: a Linear of bitsandbytes or torchao, whose stored weight is not read to run it with an adapter.

    y = base(x) + x (P theta_d)^T

Its tensors have the names and shapes of the plain Linear, so P is the same, and an adapter fits both bases. Functions
that take a layer take a SubspaceLayer whose base module is quantised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import QuantizationBackend, resolve_quantization_backend
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

from .. import plain_model


PLAIN = nn.Linear(1, 1, bias=False, device="meta")
"""A Linear that stands for any other where only the kind of operation matters."""


PACKED = (torch.int8, torch.uint8, torch.int16, torch.int32)
"""The dtypes of packed weights."""


def is_quantised(tensor: Tensor | None) -> bool:
    """Whether bitsandbytes or torchao made this tensor."""
    kind = type(tensor)
    if kind in (Tensor, nn.Parameter):  # also where torch.compile cannot follow the rest
        return False
    return kind.__name__ in ("Params4bit", "Int8Params") or kind.__module__.startswith("torchao.")


def is_quantised_linear(module: nn.Module) -> bool:
    """Whether the module computes what a Linear does, from a quantised weight."""
    if not isinstance(module, nn.Linear) or not is_quantised(module._parameters.get("weight")):
        return False
    forward = type(module).forward
    return forward is nn.Linear.forward or forward.__module__.startswith("bitsandbytes.")


def is_packed_linear(module: nn.Module) -> bool:
    """Whether the module stands for a Linear whose weight another library packs into integers, often in buffers.

    Those of GPTQ, AWQ, HQQ, EETQ and AQLM are so.
    """
    if isinstance(module, nn.Linear) or not {"in_features", "infeatures"} & set(vars(module)):
        return False
    tensors = [tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None]
    return any(tensor.dtype in PACKED and tensor.dim() > 1 for tensor in tensors)


def has_foreign_weight(module: nn.Module) -> bool:
    """Whether a weight of the module is packed, or of a quantised dtype, and does not run with an adapter."""
    if is_packed_linear(module) or is_quantised_linear(module):
        return is_packed_linear(module)
    parameters = [each for each in module._parameters.values() if each is not None and not is_lazy(each)]
    narrow = (each for each in parameters if not each.is_floating_point() or each.dtype.itemsize == 1)
    return any(each.dim() > 1 for each in narrow)


def check_not_packed(name: str, module: nn.Module) -> None:
    if is_packed_linear(module):
        raise ValueError(
            f"A quantised target must be a Linear of bitsandbytes or torchao: `{name}` is a {type(module).__name__}, "
            "which packs its weight into integers; load the model with that module unquantised, or leave it out with "
            "`exclude_modules`."
        )


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
    return plain_model.shape_of(getattr(module, path))


def dequantised(module: nn.Module) -> Tensor:
    """The weight [rows, columns] that the module computes with, in the dtype that its library gives it."""
    weight, backend = module.weight, backend_of(module)
    is_stored_whole = weight.is_floating_point() and tuple(weight.shape) == shape_of(module, "weight")
    if is_stored_whole and backend.backend_name.startswith("bnb"):
        return weight.detach()  # bitsandbytes quantises it when it is moved to a device, or at every use
    return backend.get_base_weight(module).detach()


def keep_unpacked(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights for a CPU, and unpack those that it has packed.

    It does so at evaluations without gradients where the CPU has AVX512-BF16. Packing rounds the scales, a packed
    weight gives its input no gradient, and reading a state dict leaves the scales in the wrong order.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
            state = getattr(module.weight, "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                _unpack(module.weight, state)


def _unpack(weight: Tensor, state: Any) -> None:
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    scales = state.absmax.T.reshape(-1).float()
    state.original_nested = False  # it would quantise the scales again
    weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(weight.data, state)
    weight.quant_state.absmax = scales


def float_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of what a model does not quantise, of which merged weights are."""
    modules = (module for module in model.modules() if not is_quantised_linear(module))
    tensors = (tensor for module in modules for tensor in module.parameters(recurse=False))
    floats = (tensor.dtype for tensor in tensors if tensor.is_floating_point() and not is_quantised(tensor))
    return next(floats, torch.get_default_dtype())


# --------------------------------------------------------------------------------------------- the forward of a layer


def run(x: Tensor, increments: dict[str, Tensor]) -> Tensor:
    """x (P theta_d)^T plus the increment to the bias; both are in the dtype of x or of autocast."""
    weight, bias = increments.get("weight"), increments.get("bias")
    return bias if weight is None else F.linear(x, weight, bias)


def output_of(module: nn.Module, forward: Callable, x: Tensor) -> Tensor:
    """forward(x) of a quantised module, with a gradient to x where its library gives none.

    torchao gives none where it quantises x too.
    """
    return _with_gradient(module, (x,), {}, forward(x))


def pass_gradients(model: nn.Module) -> None:
    """Let a gradient pass the quantised modules that no adapter moves, where their library gives none."""
    adapted = {layer.base_layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)}
    for module in model.modules():
        is_of_torchao = is_quantised_linear(module) and type(module.weight).__module__.startswith("torchao.")
        if is_of_torchao and module not in adapted and _with_gradient not in module._forward_hooks.values():
            module.register_forward_hook(_with_gradient, with_kwargs=True)


def _with_gradient(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
    x = args[0] if args else next(iter(kwargs.values()))
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


def forget(model: nn.Module) -> None:
    """Make a model of transformers one that was never quantised, once it has no quantised tensor any more."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not any(is_quantised(parameter) for parameter in model.parameters()):
        quantizer.remove_quantization_config(model)


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
