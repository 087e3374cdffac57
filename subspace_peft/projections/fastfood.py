"""Fastfood: Gaussian rows from two Hadamard transforms."""

import torch
from torch import Tensor

from ..hadamard import hadamard, matrix, next_power_of_two
from .base import Block, Projection, working
from .blocks import Blocks


class Fastfood(Projection):
    """P = [H G_1 Π H B; H G_2 Π H B; ...], cropped to n rows and d columns; blocks of 2^⌈log2 d⌉.

    Le, Sarlos and Smola, "Fastfood: computing Hilbert space expansions in loglinear time", ICML 2013, without their
    S, which makes row lengths vary like those of a Gaussian matrix. B: random signs, Π: a uniform permutation, G_b:
    standard normals, H: the unnormalised Hadamard matrix; entries have variance 1 or 2.

    The paper draws B and Π for every block; here they are the tensor's own but shared by its blocks. Given
    u = Π H B theta_d the blocks H G_b u are independent because the G_b are, and u then costs O(d log d) once.
    """

    def __init__(self, block: Block):
        super().__init__(block)
        self.size = next_power_of_two(block.d)
        self.blocks = Blocks(block.n, self.size)

    def draw(self, device: torch.device) -> tuple[Tensor, ...]:
        # 2^-(k // 2) is an exact power of two: no rounding enters P
        signs = self.philox("fastfood signs").signs(0, self.size, device) * 2.0 ** -((self.size.bit_length() - 1) // 2)
        order = self.philox("fastfood permutation").permutations(self.size, 0, 1, device)[0]
        gaussian = self.philox("fastfood gaussian").normals(0, self.blocks.count * self.size, device)[0]
        factors = (matrix(size, device=device) for size in self.blocks.sizes)
        return gaussian.view(-1, self.size), signs[: self.block.d].clone(), order, order.argsort(), *factors

    def apply(self, theta_d: Tensor) -> Tensor:
        gaussian, signs, order, _, *factors = self.state(theta_d.device)
        u = hadamard(working(theta_d) * signs, self.size).index_select(-1, order)
        return self.blocks.expand(u, gaussian, factors).to(theta_d.dtype)

    def adjoint(self, grad: Tensor) -> Tensor:
        gaussian, signs, _, inverse, *factors = self.state(grad.device)
        u = self.blocks.reduce(working(grad), gaussian, factors)
        return (hadamard(u.index_select(-1, inverse))[..., : self.block.d] * signs).to(grad.dtype)

    def column_square_norms(self) -> Tensor:
        gaussian, signs, _, inverse, *_ = self.state(torch.device("cpu"))
        scale = signs[0].double() ** 2
        squares = gaussian.double().square().sum(1) * self.size * scale  # [blocks], whole ones

        def rows(indicators: Tensor) -> Tensor:
            u = hadamard(indicators) * gaussian[-1].double()
            return hadamard(u[..., inverse])[..., : self.block.d] * signs.double()

        return squares[:-1].sum() + self.blocks.last_block(squares[-1].expand(self.block.d), rows)
