"""Blocks of Hadamard transforms: what Fastfood and FastJL share."""

from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from ..hadamard import matrix, next_power_of_two
from .base import Block, Projection, working


CHUNK = 2**18  # entries of theta at a time: two such pieces stay in a core's cache
FEW = 2**15  # up to so many entries the rows of P are held: one small product is faster than a transform
ROWS = 256  # rows of the last block at a time, for column norms


class Blocks(Projection):
    """P = [D H C_1 A; D H C_2 A; ...], cropped to n rows; blocks of `size` = 2^⌈log2 d⌉ rows.

    A: [size, d] is the tensor's, C_b = I_k ⊗ diag c_b the block's, so H = H_k ⊗ H_1 ⊗ ... ⊗ H_m splits: H_k acts once
    a tensor, the others once a block, each as one product of small matrices. (Small ones mean fewer operations, few
    ones fewer passes over memory.) Positions are numbered (k, rest).

    D: random signs of the tensor, a Kronecker product like H and so part of its factors at no cost (Jin, Kolda and
    Ward, "Faster Johnson-Lindenstrauss transforms via Kronecker products", 2021). Without them H would map a gradient
    that is constant, or periodic in a power of two, to one number.
    """

    def __init__(self, block: Block):
        super().__init__(block)
        self.size = next_power_of_two(block.d)
        self.count = -(-block.n // self.size)
        self.shared = self.share()
        self.length = self.size // self.shared  # of c_b
        self.sizes = (self.shared, *radices(self.length))
        self.few = block.n * block.d <= FEW

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
        """A z: [batch, d] -> [batch, size]."""

    @abstractmethod
    def first_adjoint(self, v: Tensor, *state: Tensor) -> Tensor:
        """A^T v: [batch, size] -> [batch, d]."""

    @abstractmethod
    def whole_square_norms(self, c: Tensor, *state: Tensor) -> Tensor:
        """Column square norms of whole blocks, float64 [blocks, d] or [blocks, 1]."""

    def draw_factors(self, device: torch.device) -> list[Tensor]:
        """H_k, H_1, ..., H_m with the signs D on their rows."""
        signs = [self.philox(f"outer signs {k}").signs(0, size, device) for k, size in enumerate(self.sizes)]
        return [matrix(len(s), device=device) * s.unsqueeze(1) for s in signs]

    def draw(self, device: torch.device) -> tuple:
        state = self.draw_coefficients(device), self.draw_factors(device), self.draw_first(device)
        if not self.few:
            return state
        return (self._adjoint(torch.eye(self.block.n, dtype=torch.float64, device=device), state).float(),)

    def apply(self, theta_d: Tensor) -> Tensor:
        z, state = working(theta_d), self.state(theta_d.device)
        y = z @ state[0].to(z.dtype).mT if self.few else self._apply(z.reshape(-1, self.block.d).contiguous(), state)
        return y.view(*theta_d.shape[:-1], self.block.n).to(theta_d.dtype)

    def adjoint(self, grad: Tensor) -> Tensor:
        g, state = working(grad), self.state(grad.device)
        z = g @ state[0].to(g.dtype) if self.few else self._adjoint(g.reshape(-1, self.block.n).contiguous(), state)
        return z.view(*grad.shape[:-1], self.block.d).to(grad.dtype)

    def column_square_norms(self) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            if self.few:
                return self.state(torch.device("cpu"))[0].double().square().sum(0)
            return self._column_square_norms()

    def _apply(self, z: Tensor, state: tuple) -> Tensor:
        """[batch, d] -> [batch, n]."""
        c, factors, first = state
        if z.dtype != c.dtype:
            c, factors = c.to(z.dtype), [h.to(z.dtype) for h in factors]
        v = self._before(self.first(z, *first), factors)
        if torch.compiler.is_compiling() or len(z) * self.count * self.size <= CHUNK:
            return self._transform(v, c, factors).view(len(z), -1)[:, : self.block.n]
        out = z.new_empty(len(z), self.block.n)
        step = max(1, CHUNK // self.size)
        for row, y in enumerate(out):
            for at in range(0, self.count, step):
                part = y[at * self.size : (at + step) * self.size]
                whole = part if len(part) % self.size == 0 else None
                x = self._transform(v[row : row + 1], c[at : at + step], factors, whole)
                if whole is None:
                    part.copy_(x.view(-1)[: len(part)])
        return out

    def _adjoint(self, g: Tensor, state: tuple) -> Tensor:
        """[batch, n] -> [batch, d]."""
        c, factors, first = state
        if g.dtype != c.dtype:
            c, factors = c.to(g.dtype), [h.to(g.dtype) for h in factors]
        missing = self.count * self.size - self.block.n
        if torch.compiler.is_compiling() or g.numel() <= CHUNK:
            total = self._transposed(pad(g, (0, missing)) if missing else g, c, factors)
        else:
            step = max(1, CHUNK // self.size)
            rows = []
            for row in g:
                total = 0
                for at in range(0, self.count, step):
                    part = row[at * self.size : (at + step) * self.size]
                    part = pad(part, (0, missing)) if len(part) % self.size else part
                    total = total + self._transposed(part.view(1, -1), c[at : at + step], factors)
                rows.append(total)
            total = torch.cat(rows)
        return self.first_adjoint(self._after(total, factors), *first)

    # With one factor H_1 the coefficients become the left side of a product of all blocks at once:
    # H_1 (c_b ∘ v) = (H_1 diag v) c_b, where W = H_1 diag v: [size / k, size] costs little.

    def _before(self, v: Tensor, factors: list[Tensor]) -> Tensor:
        """H_k: [batch, size] -> [batch, 1, k, size / k], or W."""
        v = v.view(-1, self.shared, self.length)
        if len(factors) > 2:
            return (v if self.shared == 1 else torch.matmul(factors[0], v)).unsqueeze(1)
        v = v.mT if self.shared == 1 else torch.matmul(v.mT, factors[0].mT)
        return (v.unsqueeze(3) * factors[1].mT.unsqueeze(1)).view(-1, self.length, self.size)

    def _after(self, total: Tensor, factors: list[Tensor]) -> Tensor:
        """The transpose of `_before`."""
        if len(factors) == 2:
            total = total.view(-1, self.length, self.shared, self.length) * factors[1].mT.unsqueeze(1)
            total = total.sum(3).mT
        return (total if self.shared == 1 else torch.matmul(factors[0].mT, total)).reshape(-1, self.size)

    def _transform(self, v: Tensor, c: Tensor, factors: list[Tensor], out: Tensor | None = None) -> Tensor:
        """-> [batch, blocks, size], in whatever shape."""
        if len(factors) == 2:
            return torch.matmul(c, v) if out is None else torch.mm(c, v[0], out=out.view(-1, self.size))
        left, *others, last = factors[1:]
        inner = len(last)
        x = torch.mm((v * c.unsqueeze(1)).view(-1, inner), last.mT)
        for h in reversed(others):
            x, inner = _product(h, x, inner), inner * len(h)
        return _product(left, x, inner, out)

    def _transposed(self, y: Tensor, c: Tensor, factors: list[Tensor]) -> Tensor:
        """[batch, blocks * size] -> [batch, k, size / k], or with one factor [batch, size / k, size]."""
        batch, inner = len(y), self.length
        if len(factors) == 2:
            return torch.matmul(c.mT, y.view(batch, -1, self.size))
        for h in factors[1:-1]:
            inner //= len(h)
            y = _product(h.mT, y, inner)
        x = torch.mm(y.view(-1, inner), factors[-1]).view(batch, -1, self.shared, self.length)
        return x.mul_(c.unsqueeze(1)).sum(1)

    def _column_square_norms(self) -> Tensor:
        """Whole blocks by formula; of the last one, of which the first rows count, the smaller side of the crop."""
        c, factors, first = self.state(torch.device("cpu"))
        whole = self.whole_square_norms(c, *first)
        kept = self.block.n - (self.count - 1) * self.size
        start, stop = (0, kept) if 2 * kept < self.size else (kept, self.size)
        part = torch.zeros(self.block.d, dtype=torch.float64)
        factors, c = [h.double() for h in factors], c.double()
        for at in range(start, stop, ROWS):
            rows = one_hot(torch.arange(at, min(at + ROWS, stop)), self.size).double()
            rows = self.first_adjoint(self._after(self._transposed(rows, c[-1:], factors), factors), *first)
            part += rows.square().sum(0)
        return whole[:-1].sum(0) + (part if start == 0 else whole[-1] - part)


def _product(h: Tensor, x: Tensor, inner: int, out: Tensor | None = None) -> Tensor:
    """h times each [r, inner] matrix of x."""
    x = x.view(-1, len(h), inner)
    h = h.expand(len(x), -1, -1)
    return torch.bmm(h, x) if out is None else torch.bmm(h, x, out=out.view(x.shape))


def radices(size: int) -> list[int]:
    """Sizes of the factors H_1, ..., H_m, by measurement.

    The signs D follow them: another choice is another P, and so another projection version.
    """
    k = size.bit_length() - 1
    parts = 1 if k <= 6 else 2 if k <= 10 else -(-2 * k // 9)
    return [2 ** ((k + i) // parts) for i in range(parts)]
