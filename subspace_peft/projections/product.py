"""Product: x (P z)ᵀ from x and z, without the tensor P z."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from .base import full_precision
from .fastjl import FastJL
from .mixing import Mixing, padded


ENTRIES_AT_A_TIME = 2**18  # of the larger of inputs and outputs: a chunk of tokens then stays in a core's cache


class Product(torch.autograd.Function):
    """output + x Wᵀ, or + x W if `transposed`, with W = M F z: x [tokens, inputs], z [d] -> [tokens, outputs].

    It is computed in float32 at least and rounded once, to the dtype of the output. x and z are saved, and F z is
    computed again. Without F, z stands for F z; without an output, the result is the product alone.
    """

    @staticmethod
    def forward(x, z, output, mixing, F, transposed):
        with full_precision(x):
            C, inputs, (matrix, signs) = operands(x, z, mixing, F, transposed)
            width = mixing.c if transposed else mixing.r
            total, signs = C.new_empty(len(x), width) if output is None else torch.empty_like(output), signs[:width]
            for at in _chunks(x, total):
                y = leave(enter(x[at].to(C.dtype), *inputs) @ C.mT, matrix)[:, :width]
                if output is None:
                    torch.mul(y, signs, out=total[at])
                else:
                    torch.addcmul(output[at], y, signs, out=total[at])
        return total

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, z, _, *ctx.constants = inputs
        ctx.save_for_backward(x, z)

    @staticmethod
    def backward(ctx, grad):
        (x, z), (mixing, F, transposed) = ctx.saved_tensors, ctx.constants
        to_output = grad if ctx.needs_input_grad[2] else None
        if torch.is_grad_enabled():  # derivatives of higher order go through the operations
            ends = x.view_as(x), z.view_as(z)  # x may depend on z: the graph ends at these
            y, needed = product(*ends, None, *ctx.constants), ctx.needs_input_grad[:2]
            wanted = [end for end, is_needed in zip(ends, needed, strict=True) if is_needed]
            found = iter(torch.autograd.grad(y, wanted, grad.to(y.dtype), create_graph=True))
            return *(next(found) if is_needed else None for is_needed in needed), to_output, *[None] * 3
        with full_precision(x):
            C, (matrix, signs), outputs = operands(x, z, mixing, F, transposed)
            to_x = torch.empty_like(x, memory_format=torch.contiguous_format) if ctx.needs_input_grad[0] else None
            to_C = torch.zeros_like(C) if ctx.needs_input_grad[1] else None
            width = x.shape[1]
            for at in _chunks(x, grad):
                V = enter(grad[at].to(C.dtype), *outputs)
                if to_x is not None:
                    torch.mul(leave(V @ C, matrix)[:, :width], signs[:width], out=to_x[at])
                if to_C is not None:
                    to_C.baddbmm_(V.mT, enter(x[at].to(C.dtype), matrix, signs))
            if to_C is not None:
                to_C = (to_C.mT if transposed else to_C).reshape(-1)
                to_C = (to_C if F is None else F.adjoint(to_C)).to(z.dtype)
        return to_x, to_C, to_output, None, None, None


# as in base.py
Product.forward.__signature__ = inspect.signature(Product.forward)


def product(x: Tensor, z: Tensor, output: Tensor | None, mixing: Mixing, F: FastJL | None, transposed: bool) -> Tensor:
    """What Product computes, by operations that can be recorded, transformed and differentiated one by one."""
    with full_precision(x):
        C, inputs, (matrix, signs) = operands(x, z, mixing, F, transposed)
        y = (leave(enter(x.to(C.dtype), *inputs) @ C.mT, matrix) * signs)[:, : mixing.c if transposed else mixing.r]
        return y if output is None else (output + y).to(output.dtype)


def operands(x: Tensor, z: Tensor, mixing: Mixing, F: FastJL | None, transposed: bool) -> tuple:
    """C [n, ⌈outputs / n⌉, ⌈inputs / n⌉], and the matrix and signs that mix the inputs, and the outputs."""
    C = z if F is None else F(z)
    C = mixing.in_blocks(C.to(torch.promote_types(torch.float32, torch.promote_types(x.dtype, C.dtype))))
    A, H, s, t = mixing.matrices(C)
    return (C.mT, (A, s), (H, t)) if transposed else (C, (H, t), (A, s))


def look_up(at: Tensor, z: Tensor, mixing: Mixing, F: FastJL | None) -> Tensor:
    """The rows of W = M F z at these indices, the product with their unit vectors: [rows], [d] -> [rows, c].

    Nothing but F z is as large as the part of it that W is made of; autograd keeps no row.
    """
    with full_precision(z):
        C, inputs, (A, s) = operands(z, z, mixing, F, False)
        coefficients = (A[at % mixing.n] * s[at].unsqueeze(1)).t().unsqueeze(2)  # [n, rows, 1]
        return leave(C.index_select(1, at // mixing.n) * coefficients, inputs[0]) * inputs[1]


def enter(x: Tensor, matrix: Tensor, signs: Tensor) -> Tensor:
    """Mix n neighbours, with zeros up to k n: [tokens, up to k n] -> [n, tokens, k]."""
    n, x = len(matrix), padded(x, len(signs), -1)
    return torch.mm(matrix.t(), (x * signs).view(-1, n).t()).view(n, x.shape[0], len(signs) // n)


def leave(y: Tensor, matrix: Tensor) -> Tensor:
    """The transpose of `enter`, without the signs: [n, tokens, k] -> [tokens, k n]."""
    n, tokens, k = y.shape
    return torch.mm(y.reshape(n, tokens * k).t(), matrix.t()).view(tokens, k * n)


def _chunks(*sides: Tensor) -> list[slice]:
    """Slices of the tokens that are computed at a time."""
    step = max(1, ENTRIES_AT_A_TIME // max(x.shape[1] for x in sides))
    return [slice(at, at + step) for at in range(0, len(sides[0]), step)]
