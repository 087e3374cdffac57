"""Blocks of Hadamard transforms: what Fastfood and FastJL share."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from .base import Projection, TensorRows, working
from .hadamard import kronecker, matrix, multiply, next_power_of_two, radices
from .joint import gather
from .joint_blocks import JointBlocks


CHUNK = 2**18  # entries of theta at a time: two such pieces stay in a core's cache
FEW = 2**14  # up to so many entries the rows of P are held: one small product beats a transform; 64 KiB a tensor
ROWS = 2**22  # entries of P at a time, for column norms


class Blocks(Projection):
    """P = [D H C_1 A; D H C_2 A; ...], cropped to n rows; blocks of `size` = 2^⌈log2 d⌉ rows.

    A: [size, d] is the tensor's, C_b = I_k ⊗ diag c_b the block's, so H = H_k ⊗ H_1 ⊗ ... ⊗ H_m splits: H_k acts once
    a tensor, the others once a block, each as one product of small matrices. Positions are numbered (k, rest).

    D: random signs of the tensor, a Kronecker product like H and so part of its factors at no cost (Jin, Kolda and
    Ward, "Faster Johnson-Lindenstrauss transforms via Kronecker products", 2021). Without them H would map a gradient
    that is constant, or periodic in a power of two, to one number.
    """

    def __init__(self, rows: TensorRows):
        super().__init__(rows)
        self.size = next_power_of_two(rows.d)
        self.count = -(-rows.n // self.size)
        self.shared = self.share()
        self.length = self.size // self.shared  # of c_b
        self.sizes = (self.shared, *radices(self.length))
        self.last = rows.n - (self.count - 1) * self.size  # rows of the last block
        self.joinable = True  # whether A of several tensors has a joint form
        self.few = rows.n * rows.d <= FEW

    @abstractmethod
    def share(self) -> int:
        """k: how many positions share a coefficient; a power of two."""

    @abstractmethod
    def draw_coefficients(self, device: torch.device) -> Tensor:
        """All c_b: [blocks, size / k]."""

    @abstractmethod
    def draw_first(self, device: torch.device) -> tuple[Tensor, ...]:
        """What A needs."""

    @abstractmethod
    def first(self, z: Tensor, *state: Tensor) -> Tensor:
        """A z: [batch, d] -> [batch, size].

        With what is `joined` of several tensors: [batch, 1, d] -> [batch, tensors, size].
        """

    @abstractmethod
    def first_adjoint(self, v: Tensor, *state: Tensor) -> Tensor:
        """A^T v: [batch, size] -> [batch, d]; of several tensors [batch, tensors, size] -> [batch, tensors, d]."""

    @abstractmethod
    def joined(self, states: Sequence[tuple]) -> tuple[Tensor, ...]:
        """What A needs, of several tensors."""

    @abstractmethod
    def square_norms(self, state: tuple) -> Tensor:
        """Column square norms, exact: float64 [d]."""

    @classmethod
    def together(cls, projections):
        return gather(JointBlocks, projections) if projections[0].joinable else None

    def draw_factors(self, device: torch.device) -> list[Tensor]:
        """H_k, H_1, ..., H_m with the signs D on their rows."""
        signs = [self.philox(f"outer signs {k}").signs(0, size, device) for k, size in enumerate(self.sizes)]
        return [matrix(len(s), device=device) * s.unsqueeze(1) for s in signs]

    def draw(self, device: torch.device) -> tuple:
        state = self.draw_coefficients(device), self.draw_factors(device), self.draw_first(device)
        if not self.few:
            return state
        return (self._adjoint(torch.eye(self.rows.n, dtype=torch.float64, device=device), state).float(),)

    def apply(self, theta_d: Tensor) -> Tensor:
        z, state = working(theta_d), self.state(theta_d.device)
        y = z @ state[0].to(z.dtype).mT if self.few else self._apply(z.reshape(-1, self.rows.d).contiguous(), state)
        return y.view(*theta_d.shape[:-1], self.rows.n).to(theta_d.dtype)

    def adjoint(self, grad: Tensor) -> Tensor:
        g, state = working(grad), self.state(grad.device)
        z = g @ state[0].to(g.dtype) if self.few else self._adjoint(g.reshape(-1, self.rows.n).contiguous(), state)
        return z.view(*grad.shape[:-1], self.rows.d).to(grad.dtype)

    def column_square_norms(self) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            state = self.state(torch.device("cpu"))
            return state[0].double().square().sum(0) if self.few else self.square_norms(state)

    def _apply(self, z: Tensor, state: tuple) -> Tensor:
        """[batch, d] -> [batch, n]."""
        c, factors, first = state
        if z.dtype != c.dtype:
            c, factors = c.to(z.dtype), [h.to(z.dtype) for h in factors]
        v, batch = self._before(z, factors, first), z.shape[0]
        if torch.compiler.is_compiling() or batch * self.count * self.size <= CHUNK:
            return self._transform(v, c, factors).view(batch, -1)[:, : self.rows.n]
        out = z.new_empty(batch, self.rows.n)
        for row, y in zip(v.unsqueeze(1), out, strict=True):
            for blocks, entries in self._pieces():
                part = y[entries]
                if part.shape[0] % self.size == 0:
                    self._transform(row, c[blocks], factors, part)
                else:
                    part.copy_(self._transform(row, c[blocks], factors).view(-1)[: part.shape[0]])
        return out

    def _adjoint(self, g: Tensor, state: tuple) -> Tensor:
        """[batch, n] -> [batch, d]."""
        c, factors, first = state
        if g.dtype != c.dtype:
            c, factors = c.to(g.dtype), [h.to(g.dtype) for h in factors]
        if torch.compiler.is_compiling() or g.numel() <= CHUNK:
            return self._after(self._transposed(self._padded(g), c, factors), factors, first)
        totals = []
        for row in g.unsqueeze(1):
            pieces = ((self._padded(row[:, entries]), c[blocks]) for blocks, entries in self._pieces())
            totals.append(sum(self._transposed(piece, its, factors) for piece, its in pieces))
        return self._after(torch.cat(totals), factors, first)

    def _pieces(self) -> list[tuple[slice, slice]]:
        """Blocks, and their entries of the tensor, that fit into the cache together."""
        step = max(1, CHUNK // self.size)
        starts = range(0, self.count, step)
        return [(slice(at, at + step), slice(at * self.size, (at + step) * self.size)) for at in starts]

    def _padded(self, g: Tensor) -> Tensor:
        """Filled up to whole blocks."""
        missing = -g.shape[1] % self.size
        return torch.constant_pad_nd(g, (0, missing)) if missing else g

    def _transform(self, v: Tensor, c: Tensor, factors: list[Tensor], out: Tensor | None = None) -> Tensor:
        """[batch, 1, k, size / k] -> [batch, blocks, size], in whatever shape."""
        return kronecker(factors[1:], v * c.unsqueeze(1), out)

    def _transposed(self, g: Tensor, c: Tensor, factors: list[Tensor]) -> Tensor:
        """[batch, blocks * size] -> [batch, k, size / k]."""
        x = kronecker([h.t() for h in factors[1:]], g).view(g.shape[0], -1, self.shared, self.length)
        return x.mul_(c.unsqueeze(1)).sum(1)

    def _before(self, z: Tensor, factors: list[Tensor], first: tuple) -> Tensor:
        """H_k A z: [batch, d] -> [batch, 1, k, size / k]."""
        v = self.first(z, *first)
        v = v if self.shared == 1 else multiply(factors[0], v, self.length)
        return v.view(-1, 1, self.shared, self.length)

    def _after(self, v: Tensor, factors: list[Tensor], first: tuple) -> Tensor:
        """Its transpose: [batch, k, size / k] -> [batch, d]."""
        v = v if self.shared == 1 else multiply(factors[0].t(), v, self.length)
        return self.first_adjoint(v.view(-1, self.size), *first)

    def row_squares(self, start: int, stop: int, state: tuple) -> Tensor:
        """Sum of the squares of rows start..stop of the last block, from the rows: float64 [d]."""
        c, factors, first = state
        factors, last = [h.double() for h in factors], c[-1:].double()
        total = torch.zeros(self.rows.d, dtype=torch.float64)
        step = max(1, ROWS // self.size)
        for at in range(start, stop, step):
            rows = one_hot(torch.arange(at, min(at + step, stop)), self.size).double()
            total += self._after(self._transposed(rows, last, factors), factors, first).square().sum(0)
        return total
