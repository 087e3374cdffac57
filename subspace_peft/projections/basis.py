"""Basis: columns that the user gives."""

import torch
from torch import Tensor

from .base import Block, Projection, working


class Basis(Projection):
    """P = the given rows [n, d], kept in their own dtype: DLDR, lottery subspaces, class gradients."""

    def __init__(self, block: Block):
        super().__init__(block)
        given = block.given
        if given is None or tuple(given.shape) != (block.n, block.d):
            got = None if given is None else tuple(given.shape)
            raise ValueError(f"`basis` must have shape {(block.n, block.d)} for {block.name}, got {got}.")

    def draw(self, device: torch.device) -> tuple[Tensor, ...]:
        return (self.block.given.detach().to(device),)

    def apply(self, theta_d: Tensor) -> Tensor:
        z = working(theta_d)
        return (z @ self.state(z.device)[0].to(z.dtype).mT).to(theta_d.dtype)

    def adjoint(self, grad: Tensor) -> Tensor:
        g = working(grad)
        return (g @ self.state(g.device)[0].to(g.dtype)).to(grad.dtype)

    def column_square_norms(self) -> Tensor:
        chunks = self.block.given.detach().split(2**15)  # in float64 the whole may not fit
        return sum(chunk.double().square().sum(0) for chunk in chunks).cpu()
