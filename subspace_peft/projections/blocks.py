"""Blocks: what Fastfood and FastJL share, many Hadamard transforms of one vector with other coefficients for each."""

from collections.abc import Callable

import torch
from torch import Tensor

CHUNK = 2**18  # entries of theta at a time: two such pieces stay in a core's cache
ROWS = 256  # rows of the last block at a time, for column norms

Factors = tuple[Tensor, ...]


class Blocks:
    """Y_b = (I_k ⊗ H_1 ⊗ ... ⊗ H_m) (c_b ∘ v) for b = 0, 1, ...: the first n entries of all of them.

    v and Y_b: [size], numbered (k, rest). c_b: [size / k], the same for each k. H_1, ..., H_m: the `factors`, Hadamard
    matrices whose sizes multiply to size / k (signs on their rows do no harm). The work is one product with each:
    small ones mean fewer operations, few ones fewer passes over memory.
    """

    def __init__(self, n: int, size: int, shared: int = 1):
        self.n, self.size, self.shared = n, size, shared
        self.count = -(-n // size)
        self.length = size // shared  # of c_b
        self.sizes = radices(self.length)
        self.step = max(1, CHUNK // size)  # blocks at a time

    def expand(self, v: Tensor, c: Tensor, factors: Factors) -> Tensor:
        """v: [..., size] -> [..., n]; c: [blocks, size / k]."""
        if v.dtype != c.dtype:
            c, factors = c.to(v.dtype), [h.to(v.dtype) for h in factors]
        if torch.compiler.is_compiling() or v.numel() * self.count <= CHUNK:
            y = self._transform(v.view(-1, 1, self.shared, self.length), c, factors)
            return y.view(*v.shape[:-1], -1)[..., : self.n]
        if v.dim() > 1:
            return torch.stack([self.expand(row, c, factors) for row in v.view(-1, self.size)]).view(*v.shape[:-1], -1)
        out = v.new_empty(self.n)
        v = v.view(1, 1, self.shared, self.length)
        for at in range(0, self.count, self.step):
            part = out[at * self.size : (at + self.step) * self.size]
            whole = part.numel() % self.size == 0
            y = self._transform(v, c[at : at + self.step], factors, part if whole else None)
            if not whole:
                part.copy_(y.view(-1)[: part.numel()])
        return out

    def reduce(self, grad: Tensor, c: Tensor, factors: Factors) -> Tensor:
        """The transpose of `expand`: [..., n] -> [..., size]."""
        if grad.dtype != c.dtype:
            c, factors = c.to(grad.dtype), [h.to(grad.dtype) for h in factors]
        missing = self.count * self.size - self.n
        if torch.compiler.is_compiling() or grad.numel() <= CHUNK:
            whole = torch.nn.functional.pad(grad, (0, missing)) if missing else grad.contiguous()
            return self._transposed(whole.view(-1, self.count * self.size), c, factors).view(*grad.shape[:-1], -1)
        if grad.dim() > 1:
            rows = [self.reduce(row, c, factors) for row in grad.reshape(-1, self.n)]
            return torch.stack(rows).view(*grad.shape[:-1], -1)
        total = grad.new_zeros(1, self.shared, self.length)
        for at in range(0, self.count, self.step):
            part = grad[at * self.size : (at + self.step) * self.size]
            if part.numel() % self.size:
                part = torch.nn.functional.pad(part, (0, missing))
            total += self._transposed(part.view(1, -1), c[at : at + self.step], factors)
        return total.view(-1)

    def _transform(self, v: Tensor, c: Tensor, factors: Factors, out: Tensor | None = None) -> Tensor:
        """v: [batch, 1, k, size / k], c: [blocks, size / k] -> [batch, blocks, size], in whatever shape."""
        *others, last = factors
        r = last.shape[0]
        x = (v * c.unsqueeze(1)).view(-1, r)
        if not others:
            return torch.mm(x, last) if out is None else torch.mm(x, last, out=out.view(-1, r))
        x, inner = torch.mm(x, last), r
        for h in others[:0:-1]:
            x, inner = _left(h, x, inner, None), inner * h.shape[0]
        return _left(others[0], x, inner, out)

    def _transposed(self, y: Tensor, c: Tensor, factors: Factors) -> Tensor:
        """y: [batch, blocks * size] -> [batch, k, size / k]."""
        batch, inner = y.shape[0], self.length
        *others, last = factors
        for h in others:
            inner //= h.shape[0]
            y = _left(h.mT, y, inner, None)
        x = torch.mm(y.view(-1, last.shape[0]), last.mT).view(batch, -1, self.shared, self.length)
        return x.mul_(c.unsqueeze(1)).sum(1)

    def last_block(self, whole: Tensor, rows: Callable[[Tensor], Tensor]) -> Tensor:
        """Column square norms of the last block, of which only the first rows belong to the tensor.

        `whole` are those of the whole block, `rows` maps indicators [k, size] of rows to those rows [k, d]. Computes
        the smaller side of the crop.
        """
        kept = self.n - (self.count - 1) * self.size
        start, stop = (0, kept) if 2 * kept < self.size else (kept, self.size)
        part = torch.zeros(1, dtype=torch.float64)
        for at in range(start, stop, ROWS):
            index = torch.arange(at, min(at + ROWS, stop))
            part = part + rows(torch.nn.functional.one_hot(index, self.size).double()).square().sum(0)
        return part if start == 0 else whole - part


def _left(h: Tensor, x: Tensor, inner: int, out: Tensor | None) -> Tensor:
    """h times each [r, inner] matrix of x."""
    x = x.view(-1, h.shape[0], inner)
    h = h.expand(x.shape[0], -1, -1)
    return torch.bmm(h, x) if out is None else torch.bmm(h, x, out=out.view(x.shape))


def radices(size: int) -> list[int]:
    """Sizes of the factors of H: two up to 1024, then three; measured."""
    k = size.bit_length() - 1
    parts = 1 if k <= 4 else 2 if k <= 10 else 3
    return [2 ** ((k + i) // parts) for i in range(parts)]
