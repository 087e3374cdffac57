"""Spectra of the quadratic wells of Larsen et al. 2021, figure 5, from long directions (0.001) to short ones (1)."""

from collections.abc import Callable

import torch
from torch import Tensor


SMALLEST = 1e-3


def bimodal(D: int) -> Tensor:
    """The first half of the directions is long."""
    return torch.where(torch.arange(D) < D // 2, SMALLEST, 1.0).double()


def continuous(D: int) -> Tensor:
    """Evenly spaced logarithms."""
    return torch.logspace(0, 1, D, base=SMALLEST, dtype=torch.float64).flip(0)


SPECTRA: dict[str, Callable[[int], Tensor]] = {"bimodal": bimodal, "continuous": continuous}
