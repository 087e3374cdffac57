"""The Walsh-Hadamard transform as Kronecker products.

H of size a b is H_a ⊗ H_b, so a transform is a few small matrix products in place of log2 n butterfly passes over
memory. H is unnormalised (entries ±1, H H = n I), symmetric, and H[i, j] = (-1)^(number of ones in i AND j).
"""

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


def hadamard(x: Tensor, size: int | None = None) -> Tensor:
    """H x over the last dimension, padded with zeros to `size`, a power of two: [..., n] -> [..., size]."""
    n = x.shape[-1]
    size = size or n
    if size <= DIRECT:
        return x @ kept_matrix(size, x)[:n]
    if n < size:
        x = torch.nn.functional.pad(x, (0, size - n))
    a = 2 ** ((size.bit_length() - 1) // 2)
    y = hadamard(x.reshape(*x.shape[:-1], a, size // a))
    return (kept_matrix(a, x) @ y).flatten(-2) if a <= DIRECT else hadamard(y.mT).mT.flatten(-2)
