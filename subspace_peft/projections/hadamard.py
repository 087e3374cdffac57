"""The Walsh-Hadamard transform as Kronecker products.

H of size a b is H_a ⊗ H_b, so a transform is a few products with small matrices in place of log2 n butterfly passes
over memory. H is unnormalised (entries ±1, H H = n I), symmetric, and H[i, j] = (-1)^(number of ones in i AND j).
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .recorded import unrecorded


MATRIX_SIZE = 256  # up to this size the transform of a vector is one product with H itself


def next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def matrix(size: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """H of a power of two: [size, size]."""
    h = torch.ones(1, 1, dtype=dtype, device=device)
    while len(h) < size:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h


@lru_cache
def _cached_matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with unrecorded():
        return matrix(size, dtype, device)


def matrix_like(size: int, x: Tensor) -> Tensor:
    """H of a power of two, in the dtype and on the device of x."""
    # torch.compile ignores a cache, and warns about it
    make = matrix if torch.compiler.is_compiling() else _cached_matrix
    return make(size, x.dtype, x.device)


def radices(size: int) -> list[int]:
    """Powers of two whose product is `size`, a single one up to 64; chosen by measurement.

    Small matrices mean fewer operations, few matrices fewer passes over memory. The signs in Blocks are drawn for
    these sizes: other sizes make another P, and so need another projection version.
    """
    k = size.bit_length() - 1
    count = 1 if k <= 6 else 2 if k <= 10 else -(-2 * k // 9)
    return [2 ** ((k + i) // count) for i in range(count)]


def kronecker(kronecker_factors: Sequence[Tensor], x: Tensor, out: Tensor | None = None) -> Tensor:
    """(F_1 ⊗ ... ⊗ F_m) times each vector in x: contiguous [..., size] -> as many entries, in any shape."""
    *others, last = kronecker_factors
    inner = last.shape[0]
    x = x.view(-1, inner)
    x = torch.mm(x, last.t(), out=None if others or out is None else out.view(x.shape))
    for k in reversed(range(len(others))):
        x, inner = multiply(others[k], x, inner, None if k else out), inner * others[k].shape[0]
    return x


def multiply(kronecker_factor: Tensor, x: Tensor, inner: int, out: Tensor | None = None) -> Tensor:
    """A Kronecker factor [r, r] times each matrix [r, inner] in x."""
    x = x.view(-1, kronecker_factor.shape[0], inner)
    kronecker_factor = kronecker_factor.expand(x.shape[0], -1, -1)
    return torch.bmm(kronecker_factor, x) if out is None else torch.bmm(kronecker_factor, x, out=out.view(x.shape))


def hadamard(x: Tensor, size: int | None = None) -> Tensor:
    """H x over the last dimension, padded with zeros to `size`, a power of two: [..., n] -> [..., size]."""
    n = x.shape[-1]
    size = size or n
    if size <= MATRIX_SIZE:
        return x @ matrix_like(size, x)[:n]
    if n < size:
        x = torch.constant_pad_nd(x, (0, size - n))
    return kronecker([matrix_like(r, x) for r in radices(size)], x.contiguous()).view(x.shape)
