"""Dense: a Gaussian matrix."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .base import Projection, TensorRows, to_working_dtype
from .recorded import unrecorded


HELD_BYTES = 2**30  # P of one tensor is held up to this size; a larger one is drawn again at each use, span by span
ENTRIES_AT_A_TIME = 2**24  # of P


class Dense(Projection):
    """P_ij independent standard normals (Li et al., "Measuring the intrinsic dimension", ICLR 2018).

    P_ij is number i of stream j of the generator. The columns for a smaller d are therefore the first columns for a
    larger one, and any range of rows can be drawn alone.
    """

    def __init__(self, rows: TensorRows):
        super().__init__(rows)
        self.rows_at_a_time = max(1, ENTRIES_AT_A_TIME // rows.d)
        self.is_held = rows.cache and 4 * rows.n * rows.d <= HELD_BYTES

    @property
    def state_bytes(self) -> int:
        return 4 * self.rows.n * self.rows.d if self.is_held else 0

    def _normals(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Rows start to stop of P, transposed: float32 [d, stop - start]."""
        return self.philox("dense").normals(start, stop, device, range(self.rows.d))

    def draw(self, device: torch.device) -> tuple[Tensor, ...]:
        return tuple(self._normals(*span, device) for span in self._spans()) if self.is_held else ()

    def _spans(self) -> list[tuple[int, int]]:
        starts = range(0, self.rows.n, self.rows_at_a_time)
        return [(start, min(start + self.rows_at_a_time, self.rows.n)) for start in starts]

    def _parts(self, device: torch.device) -> Iterator[tuple[int, int, Tensor]]:
        """Yields start, stop, and rows start to stop of P, transposed: [d, stop - start]."""
        state = self.state(device)
        for k, (start, stop) in enumerate(self._spans()):
            yield start, stop, state[k] if state else self._redraw(start, stop, device)[0]

    @torch.compiler.assume_constant_result  # as the state in base.py; in a tuple, as lone tensors share one name there
    def _redraw(self, start: int, stop: int, device: torch.device) -> tuple[Tensor]:
        with unrecorded():
            return (self._normals(start, stop, device),)

    def apply(self, theta_d: Tensor) -> Tensor:
        z = to_working_dtype(theta_d)
        return torch.cat([z @ part.to(z.dtype) for *_, part in self._parts(z.device)], -1).to(theta_d.dtype)

    def adjoint(self, grad: Tensor) -> Tensor:
        g = to_working_dtype(grad)
        # not g[..., start:stop], which vmap of torch.autograd.grad cannot take where it is all of g
        parts = ((g.narrow(-1, start, stop - start), part) for start, stop, part in self._parts(g.device))
        products = [each @ part.mT.to(g.dtype) for each, part in parts]
        return torch.stack(products).sum(0).to(grad.dtype)

    def column_square_norms(self) -> Tensor:
        parts = self._parts(torch.device("cpu"))
        return torch.stack([part.double().square().sum(1) for *_, part in parts]).sum(0)
