"""Fastfood as published implementations compute it: the baseline of projections.py.

For each tensor of n entries, P = H G Π H B on theta_d padded with zeros to 2^⌈log2 n⌉, cropped to n (Le, Sarlos and
Smola, ICML 2013). Each of the two transforms H takes log2 passes over the whole vector, and autograd keeps and
differentiates every pass. Written after the paper's description.
"""

import torch
from torch import Tensor


def butterfly(x: Tensor) -> Tensor:
    """The Walsh-Hadamard transform of a vector, stage by stage: [2^k] -> [2^k]."""
    half = 1
    while half < len(x):
        left, right = x.view(-1, 2, half).unbind(1)
        x = torch.stack((left + right, left - right), 1).view(-1)
        half *= 2
    return x


class ButterflyFastfood:
    """P of one tensor, differentiated by autograd: [d] -> [n]."""

    def __init__(self, n: int, d: int):
        self.n = n
        self.size = 1 << (max(n, d) - 1).bit_length()
        self.signs = torch.randint(0, 2, (self.size,)) * 2.0 - 1
        self.order = torch.randperm(self.size)
        self.gaussian = torch.randn(self.size)
        self.scale = 1 / (self.size * self.gaussian.square().sum()).sqrt()

    def __call__(self, theta_d: Tensor) -> Tensor:
        x = torch.nn.functional.pad(theta_d, (0, self.size - len(theta_d)))
        x = butterfly(x * self.signs)[self.order]
        return (butterfly(x * self.gaussian) * self.scale)[: self.n]

    def state(self) -> list[Tensor]:
        return [self.signs, self.order, self.gaussian]
