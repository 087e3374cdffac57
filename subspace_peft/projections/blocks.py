"""Blocks of Hadamard transforms: what Fastfood and FastJL have in common."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from . import scratch
from .base import Projection, TensorRows, to_working_dtype
from .hadamard import kronecker, matrix, multiply, next_power_of_two, radices
from .recorded import is_recorded
from .two_factors import TwoFactors


ENTRIES_AT_A_TIME = 2**18  # of theta: input and output of one transform then stay in a core's cache
MATRIX_ENTRIES = 2**14  # P of up to so many entries is held as a matrix, 64 KiB: one small product beats a transform
SQUARES_AT_A_TIME = 2**22  # entries of P that are computed at once for the column norms


class Blocks(Projection):
    """P = [D H C_1 A; D H C_2 A; ...], cropped to n rows; blocks of `size` = 2^⌈log2 d⌉ rows.

    A: [size, d] belongs to the tensor, C_b = I_k ⊗ diag c_b to block b. Therefore H = H_k ⊗ H_1 ⊗ ... ⊗ H_m splits:
    H_k is applied once a tensor, the others once a block, each as one product with a small matrix. The positions in a
    block are numbered (k, rest).

    D: random signs of the tensor. D is a Kronecker product as H is, so D H has Kronecker factors too and D costs
    nothing (Jin, Kolda and Ward, "Faster Johnson-Lindenstrauss transforms via Kronecker products", 2021). Without D, H
    would map a gradient that is constant, or periodic in a power of two, to a single entry.
    """

    BYTES_A_COEFFICIENT: float = 4

    def __init__(self, rows: TensorRows):
        super().__init__(rows)
        self.size = next_power_of_two(rows.d)
        self.block_count = -(-rows.n // self.size)
        self.last_block_rows = rows.n - (self.block_count - 1) * self.size
        self.k = self.choose_k()
        self.length = self.size // self.k  # of c_b
        self.kronecker_sizes = (self.k, *radices(self.length))
        self.is_matrix = rows.n * rows.d <= MATRIX_ENTRIES

    @property
    def state_bytes(self) -> int:
        if self.is_matrix:
            return 4 * self.rows.n * self.rows.d
        coefficients = int(self.block_count * self.length * self.BYTES_A_COEFFICIENT)
        return coefficients + 4 * sum(size**2 for size in self.kronecker_sizes) + 20 * self.size

    @abstractmethod
    def choose_k(self) -> int:
        """How many positions of a block have the same coefficient in C_b; a power of two."""

    @abstractmethod
    def draw_coefficients(self, device: torch.device) -> Tensor:
        """All c_b: [blocks, size / k]."""

    def draw_held(self, device: torch.device) -> Tensor:
        """The coefficients as they are held: [blocks, ...]."""
        return self.draw_coefficients(device)

    def coefficients(self, held: Tensor) -> Tensor:
        """The coefficients of blocks that are held so: [blocks, size / k]."""
        return held

    @abstractmethod
    def draw_inner(self, device: torch.device) -> tuple[Tensor, ...]:
        """The state of A."""

    @abstractmethod
    def inner(self, z: Tensor, *state: Tensor) -> Tensor:
        """A z: [batch, d] -> [batch, size].

        With the state that `join_inner` makes for several tensors: [batch, 1, d] -> [batch, tensors, size].
        """

    @abstractmethod
    def inner_adjoint(self, v: Tensor, *state: Tensor) -> Tensor:
        """A^T v: [batch, size] -> [batch, d]; for several tensors [batch, tensors, size] -> [batch, tensors, d]."""

    @abstractmethod
    def join_inner(self, states: Sequence[tuple]) -> tuple[Tensor, ...]:
        """One state of A for several tensors."""

    @abstractmethod
    def square_norms(self, state: tuple) -> Tensor:
        """The square norms of the columns, exact: float64 [d]."""

    def draw_kronecker_factors(self, device: torch.device) -> list[Tensor]:
        """H_k, H_1, ..., H_m, with the signs D on their rows."""
        signs = [self.philox(f"outer signs {i}").signs(0, size, device) for i, size in enumerate(self.kronecker_sizes)]
        return [matrix(len(s), device=device) * s.unsqueeze(1) for s in signs]

    def draw(self, device: torch.device) -> tuple:
        state = self.draw_held(device), self.draw_kronecker_factors(device), self.draw_inner(device)
        if not self.is_matrix:
            return state
        return (self._adjoint(torch.eye(self.rows.n, dtype=torch.float64, device=device), state).float(),)

    def apply(self, theta_d: Tensor) -> Tensor:
        z, state = to_working_dtype(theta_d), self.state(theta_d.device)
        if self.is_matrix:
            y = z @ state[0].to(z.dtype).mT
        else:
            y = self._apply(z.reshape(-1, self.rows.d).contiguous(), state)
        return y.view(*theta_d.shape[:-1], self.rows.n).to(theta_d.dtype)

    def move(self, theta_d: Tensor, origin: Tensor) -> Tensor:
        if self.is_matrix or theta_d.dim() > 1 or to_working_dtype(theta_d) is not theta_d:
            return super().move(theta_d, origin)
        return self._apply(theta_d.view(1, -1), self.state(theta_d.device), origin.reshape(-1)).view(origin.shape)

    def adjoint(self, grad: Tensor) -> Tensor:
        g, state = to_working_dtype(grad), self.state(grad.device)
        if self.is_matrix:
            z = g @ state[0].to(g.dtype)
        else:
            z = self._adjoint(g.reshape(-1, self.rows.n).contiguous(), state)
        return z.view(*grad.shape[:-1], self.rows.d).to(grad.dtype)

    def column_square_norms(self) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            state = self.state(torch.device("cpu"))
            return state[0].double().square().sum(0) if self.is_matrix else self.square_norms(state)

    def _apply(self, z: Tensor, state: tuple, origin: Tensor | None = None) -> Tensor:
        """[batch, d] -> [batch, n], plus an origin [n], which is added while a part is in the core's cache."""
        held, kronecker_factors, inner = state
        kronecker_factors = [h.to(z.dtype) for h in kronecker_factors]
        v, batch = self._common(z, kronecker_factors, inner), z.shape[0]
        if is_recorded() or batch * self.block_count * self.size <= ENTRIES_AT_A_TIME:
            y = self._blocks(v, held, kronecker_factors).view(batch, -1)[:, : self.rows.n]
            return y if origin is None else y + origin
        shape = batch, self.rows.n
        out = z.new_empty(shape) if origin is None else scratch.empty(z, shape)
        for row, y in zip(v.unsqueeze(1), out, strict=True):
            self._write(row, held, kronecker_factors, y, origin)
        return out

    def _write(
        self, v: Tensor, held: Tensor, kronecker_factors: list[Tensor], out: Tensor, origin: Tensor | None
    ) -> None:
        """Write the entries of one H_k A z, [1, 1, k, size / k], plus an origin, chunk by chunk: [n]."""
        pair = self._pair(kronecker_factors)
        M = None if pair is None else pair.matrices(v)
        for blocks, entries in self._chunks():
            part, start = out[entries], None if origin is None else origin[entries]
            is_whole = part.shape[0] % self.size == 0
            if pair is not None and is_whole:
                pair.blocks(M, self.coefficients(held[blocks]).to(v.dtype), part, start)
                continue
            y = self._blocks(v, held[blocks], kronecker_factors, part if is_whole else None)
            if not is_whole:
                part.copy_(y.view(-1)[: part.shape[0]])
            if start is not None:
                part.add_(start)

    def _adjoint(self, g: Tensor, state: tuple) -> Tensor:
        """[batch, n] -> [batch, d]."""
        held, kronecker_factors, inner = state
        kronecker_factors = [h.to(g.dtype) for h in kronecker_factors]
        if is_recorded() or g.numel() <= ENTRIES_AT_A_TIME:
            v = self._blocks_adjoint(self._padded(g), held, kronecker_factors)
            return self._common_adjoint(v, kronecker_factors, inner)
        totals = [self._sum_of_chunks(row, held, kronecker_factors) for row in g.unsqueeze(1)]
        return self._common_adjoint(torch.cat(totals), kronecker_factors, inner)

    def _sum_of_chunks(self, g: Tensor, held: Tensor, kronecker_factors: list[Tensor]) -> Tensor:
        """[1, n] -> [1, k, size / k]."""
        pair = self._pair(kronecker_factors)
        chunks = ((self._padded(g[:, entries]), held[blocks]) for blocks, entries in self._chunks())
        if pair is None:
            return sum(self._blocks_adjoint(chunk, c, kronecker_factors) for chunk, c in chunks)
        total = g.new_zeros(self.k, pair.a, pair.b, pair.b)
        for chunk, c in chunks:
            pair.add_adjoint(total, self.coefficients(c).to(g.dtype), chunk)
        return pair.adjoint(total)

    def _pair(self, kronecker_factors: list[Tensor]) -> TwoFactors | None:
        return TwoFactors(*kronecker_factors[1:], self.k) if len(kronecker_factors) == 3 else None

    def _chunks(self) -> list[tuple[slice, slice]]:
        """Slices of the blocks, and of the tensor's entries, that are transformed at a time."""
        step = max(1, ENTRIES_AT_A_TIME // self.size)
        starts = range(0, self.block_count, step)
        return [(slice(at, at + step), slice(at * self.size, (at + step) * self.size)) for at in starts]

    def _padded(self, g: Tensor) -> Tensor:
        """g with zeros up to whole blocks."""
        missing = -g.shape[1] % self.size
        return torch.constant_pad_nd(g, (0, missing)) if missing else g

    def _common(self, z: Tensor, kronecker_factors: list[Tensor], inner: tuple) -> Tensor:
        """H_k A z, the part common to all blocks: [batch, d] -> [batch, 1, k, size / k]."""
        v = self.inner(z, *inner)
        v = v if self.k == 1 else multiply(kronecker_factors[0], v, self.length)
        return v.view(-1, 1, self.k, self.length)

    def _common_adjoint(self, v: Tensor, kronecker_factors: list[Tensor], inner: tuple) -> Tensor:
        """[batch, k, size / k] -> [batch, d]."""
        v = v if self.k == 1 else multiply(kronecker_factors[0].t(), v, self.length)
        return self.inner_adjoint(v.view(-1, self.size), *inner)

    def _blocks(self, v: Tensor, held: Tensor, kronecker_factors: list[Tensor], out: Tensor | None = None) -> Tensor:
        """[batch, 1, k, size / k] -> batch * blocks * size entries in that order, in any shape."""
        return kronecker(kronecker_factors[1:], v * self.coefficients(held).to(v.dtype).unsqueeze(1), out)

    def _blocks_adjoint(self, g: Tensor, held: Tensor, kronecker_factors: list[Tensor]) -> Tensor:
        """[batch, blocks * size] -> [batch, k, size / k]."""
        x = kronecker([h.t() for h in kronecker_factors[1:]], g).view(g.shape[0], -1, self.k, self.length)
        return x.mul_(self.coefficients(held).to(x.dtype).unsqueeze(1)).sum(1)

    def row_squares(self, start: int, stop: int, state: tuple) -> Tensor:
        """The sum of the squares of rows start to stop of the last block, from the rows themselves: float64 [d]."""
        held, kronecker_factors, inner = state
        kronecker_factors = [h.double() for h in kronecker_factors]
        total = torch.zeros(self.rows.d, dtype=torch.float64)
        step = max(1, SQUARES_AT_A_TIME // self.size)
        for at in range(start, stop, step):
            units = one_hot(torch.arange(at, min(at + step, stop)), self.size).double()
            v = self._blocks_adjoint(units, held[-1:], kronecker_factors)
            total += self._common_adjoint(v, kronecker_factors, inner).square().sum(0)
        return total
