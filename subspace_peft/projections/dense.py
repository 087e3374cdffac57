"""Dense: a Gaussian matrix."""

import torch
from torch import Tensor

from .base import Projection, TensorRows, working


HELD_BYTES = 2**30  # a P up to this size (for one tensor) is held, a larger one is redrawn piece by piece
PIECE = 2**24  # entries of P at a time


class Dense(Projection):
    """P_ij independent standard normals (Li et al., "Measuring the intrinsic dimension", ICLR 2018).

    Column j is stream j of the generator and row i its number i: the columns for a smaller d are the first columns
    for a larger one, and any range of rows can be drawn alone.
    """

    def __init__(self, rows: TensorRows):
        super().__init__(rows)
        self.step = max(1, PIECE // rows.d)  # rows at a time
        self.held = rows.cache and 4 * rows.n * rows.d <= HELD_BYTES

    def _normals(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Rows start..stop of P, transposed: float32 [d, stop - start]."""
        return self.philox("dense").normals(start, stop, device, range(self.rows.d))

    def draw(self, device: torch.device) -> tuple[Tensor, ...]:
        return tuple(self._normals(*span, device) for span in self._spans()) if self.held else ()

    def _spans(self) -> list[tuple[int, int]]:
        return [(at, min(at + self.step, self.rows.n)) for at in range(0, self.rows.n, self.step)]

    def _pieces(self, device: torch.device):
        """Yields (start, stop, those rows of P transposed [d, stop - start])."""
        held = self.state(device)
        for k, (start, stop) in enumerate(self._spans()):
            yield start, stop, held[k] if held else self._redraw(start, stop, device)

    @torch.compiler.disable
    def _redraw(self, start: int, stop: int, device: torch.device) -> Tensor:
        return self._normals(start, stop, device)

    def apply(self, theta_d: Tensor) -> Tensor:
        z = working(theta_d)
        return torch.cat([z @ p.to(z.dtype) for *_, p in self._pieces(z.device)], -1).to(theta_d.dtype)

    def adjoint(self, grad: Tensor) -> Tensor:
        g = working(grad)
        parts = [g[..., start:stop] @ p.mT.to(g.dtype) for start, stop, p in self._pieces(g.device)]
        return torch.stack(parts).sum(0).to(grad.dtype)

    def column_square_norms(self) -> Tensor:
        pieces = self._pieces(torch.device("cpu"))
        return torch.stack([p.double().square().sum(1) for *_, p in pieces]).sum(0)
