"""Basis: columns that the user gives."""

import torch
from torch import Tensor

from .base import Projection, TensorRows, to_working_dtype


ROWS_AT_A_TIME = 2**15  # for the column norms, which are computed in float64


class Basis(Projection):
    """P = the given rows [n, d], kept in their own dtype: DLDR, lottery subspaces, class gradients."""

    def __init__(self, rows: TensorRows):
        super().__init__(rows)
        given = rows.given
        if given is None or tuple(given.shape) != (rows.n, rows.d):
            got = None if given is None else tuple(given.shape)
            raise ValueError(f"`basis` must have shape {(rows.n, rows.d)} for {rows.name}, got {got}.")

    def draw(self, device: torch.device) -> tuple[Tensor, ...]:
        return (self.rows.given.detach().to(device),)

    def apply(self, theta_d: Tensor) -> Tensor:
        z = to_working_dtype(theta_d)
        return (z @ self.state(z.device)[0].to(z.dtype).mT).to(theta_d.dtype)

    def adjoint(self, grad: Tensor) -> Tensor:
        g = to_working_dtype(grad)
        return (g @ self.state(g.device)[0].to(g.dtype)).to(grad.dtype)

    def column_square_norms(self) -> Tensor:
        chunks = self.rows.given.detach().split(ROWS_AT_A_TIME)
        return sum(chunk.double().square().sum(0) for chunk in chunks).cpu()
