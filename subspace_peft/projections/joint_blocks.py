"""JointBlocks: the blocks of several tensors, transformed in one go."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .base import working
from .hadamard import kronecker, matrix
from .joint import Joint


if TYPE_CHECKING:
    from .blocks import Blocks


class JointBlocks(Joint):
    """[D_1 H C_1 A_1; D_1 H C_2 A_1; ...; D_2 H C_1 A_2; ...]: the whole blocks of each tensor, uncropped; see Blocks.

    The transforms of all blocks are one: what is a tensor's own in Blocks, the signs D, is multiplied apart.
    """

    members: list[Blocks]

    @staticmethod
    def extent(member: Blocks) -> tuple[int, int]:
        return member.rows.n, member.size - member.last

    def draw(self, device: torch.device) -> tuple:
        """c: [blocks, 1, length], D: [tensors, 1, length], the tensor of each block, H_k: [tensors, k, k], H, A."""
        one = self.members[0]
        c = torch.cat([member.draw_coefficients(device) for member in self.members])
        counts = torch.tensor([member.count for member in self.members], device=device)
        owner = torch.arange(len(counts), device=device).repeat_interleave(counts)
        shared, *factors = zip(*(member.draw_factors(device) for member in self.members), strict=True)
        signs = torch.ones(len(counts), 1, device=device)
        for own in factors:
            column = torch.stack(own)[:, :, 0]  # the first of H is all ones, and so that of D H is D
            signs = (signs.unsqueeze(2) * column.unsqueeze(1)).flatten(1)
        plain = [matrix(size, device=device) for size in one.sizes[1:]]
        first = one.joined([member.draw_first(device) for member in self.members])
        return c.unsqueeze(1), signs.unsqueeze(1), owner, torch.stack(shared), plain, first

    def apply(self, z: Tensor) -> Tensor:
        one, (c, signs, owner, shared, plain, first) = self.members[0], self.state(z)
        v = one.first(working(z).reshape(-1, 1, one.rows.d), *first)
        if one.shared > 1:
            v = shared @ v.view(-1, len(self.members), one.shared, one.length)
        v = v.view(-1, len(self.members), one.shared, one.length).index_select(1, owner).mul_(c)
        y = kronecker(plain, v).view(v.shape).mul_(signs.index_select(0, owner))
        return y.view(*z.shape[:-1], -1).to(z.dtype)

    def adjoint(self, grad: Tensor) -> Tensor:
        one, (c, signs, owner, shared, plain, first) = self.members[0], self.state(grad)
        g = working(grad).reshape(-1, len(owner), one.shared, one.length) * signs.index_select(0, owner)
        x = kronecker(plain, g).view(g.shape).mul_(c)
        v = x.new_zeros(len(x), len(self.members), one.shared, one.length).index_add_(1, owner, x)
        if one.shared > 1:
            v = shared.mT @ v
        v = one.first_adjoint(v.view(-1, len(self.members), one.size), *first)
        return v.sum(1).view(*grad.shape[:-1], -1).to(grad.dtype)
