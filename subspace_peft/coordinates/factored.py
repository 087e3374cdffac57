"""Factored: running a module whose weight is a product of two factors, without forming the product."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..projections.base import full_precision


Operation = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(module, x, left [rows, rank], right [rank, columns], bias) -> output; the weight is left @ right."""


def _linear(module, x, left, right, bias):
    return F.linear(F.linear(x, right), left, bias)


def _conv1d(module, x, left, right, bias):
    return F.linear(F.linear(x, left.mT), right.mT, bias)


def _conv(module, x, left, right, bias):
    """A convolution to `rank` channels, then one with a 1 x 1 kernel."""
    ones = [1] * len(module.kernel_size)
    inner = module._conv_forward(x, right.view(-1, module.in_channels, *module.kernel_size), None)
    return (F.conv1d, F.conv2d, F.conv3d)[len(ones) - 1](inner, left.view(*left.shape, *ones), bias)


def _embedding(module, x, left, right, bias):
    rows = F.embedding(x, left, module.padding_idx)
    with full_precision(rows):  # autocast does not round the output of an embedding either
        out = F.linear(rows, right.mT)
    if module.padding_idx is None:
        return out
    # A padding row that moves, as a given basis may say, still has no gradient: nn.Embedding gives it none.
    return torch.where((x == module.padding_idx).unsqueeze(-1), out.detach(), out)


OPERATIONS: dict[Callable, Operation] = {
    nn.Linear.forward: _linear,
    Conv1D.forward: _conv1d,
    nn.Conv1d.forward: _conv,
    nn.Conv2d.forward: _conv,
    nn.Conv3d.forward: _conv,
    nn.Embedding.forward: _embedding,
}
"""By the forward method that each replaces: a subclass with a forward of its own may compute something else."""


def operation(module: nn.Module) -> Operation | None:
    """The way to run `module` through two factors in turn; None if it has none.

    `scale_grad_by_freq` scales the gradient of the weight, which is not there then.
    """
    if getattr(module, "groups", 1) > 1 or getattr(module, "scale_grad_by_freq", False):
        return None
    return OPERATIONS.get(type(module).forward)


def run(module: nn.Module, x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """The output of `module` with weight left @ right and this bias, in the dtype that `module` would compute in."""
    dtype = x.dtype if x.is_floating_point() else module.weight.dtype
    if x.is_floating_point() and dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, bias = x.to(dtype), bias if bias is None else bias.to(dtype)
    return operation(module)(module, x, left.to(dtype), right.to(dtype), bias)


class Factored(nn.Sequential):
    """Two modules that run one after the other in place of one.

    `weight` is their product and `bias` that of the second: some models read these attributes of their submodules.

    Args:
        shape: The shape of the weight.
        transposed: Whether the weight is stored [inputs, outputs], as in transformers' Conv1D.
    """

    def __init__(self, first: nn.Module, second: nn.Module, shape: torch.Size, transposed: bool):
        super().__init__(first, second)
        self.shape, self.transposed = shape, transposed

    @property
    def weight(self) -> Tensor:
        first, second = self[0].weight.flatten(1), self[1].weight.flatten(1)
        if isinstance(self[0], nn.Embedding):
            return first @ second.mT
        return ((second @ first).mT if self.transposed else second @ first).view(self.shape)

    @property
    def bias(self) -> Tensor | None:
        return getattr(self[1], "bias", None)


def smaller(module: nn.Module, left: Tensor, right: Tensor) -> Factored:
    """Two smaller modules that together compute what `module` computes with weight left @ right."""
    bias, rank, transposed = getattr(module, "bias", None), len(right), isinstance(module, Conv1D)
    if isinstance(module, nn.Embedding):
        first = nn.Embedding(module.num_embeddings, rank, module.padding_idx)
        second = nn.Linear(rank, module.embedding_dim, bias=False)
        weights = left, right.mT
    elif isinstance(module, nn.Linear | Conv1D):
        weights = (left.mT, right.mT) if transposed else (right, left)
        first = nn.Linear(weights[0].shape[1], rank, bias=False)
        second = nn.Linear(rank, len(weights[1]), bias=bias is not None)
    else:
        options = {key: getattr(module, key) for key in ("stride", "padding", "dilation", "padding_mode")}
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(module.kernel_size) - 1]  # a subclass may take other arguments
        first = kind(module.in_channels, rank, module.kernel_size, bias=False, **options)
        second = kind(rank, module.out_channels, 1, bias=bias is not None)
        weights = right, left
    for part, weight in zip((first, second), weights, strict=True):
        part.weight = nn.Parameter(weight.detach().reshape(part.weight.shape).to(module.weight.dtype).clone())
    if bias is not None:
        second.bias = nn.Parameter(bias.detach().clone())
    return Factored(first, second, module.weight.shape, transposed).train(module.training)
