"""The Walsh-Hadamard transform as Kronecker products.

H of size a b is H_a ⊗ H_b, so a transform is a few small matrix products in place of log2 n butterfly passes over
memory. H is unnormalised (entries ±1, H H = n I), symmetric, and H[i, j] = (-1)^(number of ones in i AND j).
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


DIRECT = 256  # up to this size the transform of a vector is one product with H itself


def next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def matrix(size: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """H of a power of two: [size, size]."""
    h = torch.ones(1, 1, dtype=dtype, device=device)
    while len(h) < size:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h


@lru_cache
def _kept_matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return matrix(size, dtype, device)


def kept_matrix(size: int, x: Tensor) -> Tensor:
    """H of a power of two, in the dtype and on the device of x."""
    # torch.compile looks through a cache, and warns
    made = matrix if torch.compiler.is_compiling() else _kept_matrix
    return made(size, x.dtype, x.device)


def radices(size: int) -> list[int]:
    """Powers of two, by measurement, whose product is `size`; one up to 64.

    Small ones mean fewer operations, few ones fewer passes over memory. The signs of Blocks follow them: another
    choice is another P, and so another projection version.
    """
    k = size.bit_length() - 1
    parts = 1 if k <= 6 else 2 if k <= 10 else -(-2 * k // 9)
    return [2 ** ((k + i) // parts) for i in range(parts)]


def kronecker(factors: Sequence[Tensor], x: Tensor, out: Tensor | None = None) -> Tensor:
    """(F_1 ⊗ ... ⊗ F_m) of each vector in x: contiguous [..., size] -> as many numbers, in whatever shape."""
    *others, last = factors
    inner = last.shape[0]
    x = x.view(-1, inner)
    x = torch.mm(x, last.t(), out=None if others or out is None else out.view(x.shape))
    for k in reversed(range(len(others))):
        x, inner = multiply(others[k], x, inner, None if k else out), inner * others[k].shape[0]
    return x


def multiply(factor: Tensor, x: Tensor, inner: int, out: Tensor | None = None) -> Tensor:
    """factor times each matrix [r, inner] of x."""
    x = x.view(-1, factor.shape[0], inner)
    factor = factor.expand(x.shape[0], -1, -1)
    return torch.bmm(factor, x) if out is None else torch.bmm(factor, x, out=out.view(x.shape))


def hadamard(x: Tensor, size: int | None = None) -> Tensor:
    """H x over the last dimension, padded with zeros to `size`, a power of two: [..., n] -> [..., size]."""
    n = x.shape[-1]
    size = size or n
    if size <= DIRECT:
        return x @ kept_matrix(size, x)[:n]
    if n < size:
        x = torch.constant_pad_nd(x, (0, size - n))
    return kronecker([kept_matrix(r, x) for r in radices(size)], x.contiguous()).view(x.shape)
