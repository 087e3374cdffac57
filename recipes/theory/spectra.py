"""The spectra of the quadratic wells of figure 5, from long directions (eigenvalue 0.001) to short ones (1)."""

from collections.abc import Callable

import torch
from torch import Tensor


SMALLEST = 1e-3


def bimodal(D: int) -> Tensor:
    """Half of the directions are long."""
    return torch.where(torch.arange(D) < D // 2, SMALLEST, 1.0).double()


def continuous(D: int) -> Tensor:
    """Evenly spread in the logarithm."""
    return torch.logspace(0, 1, D, base=SMALLEST, dtype=torch.float64).flip(0)


SPECTRA: dict[str, Callable[[int], Tensor]] = {"bimodal": bimodal, "continuous": continuous}
