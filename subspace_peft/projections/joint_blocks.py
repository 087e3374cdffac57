"""JointBlocks: the blocks of several tensors, transformed at once."""

import torch
from torch import Tensor

from .base import to_working_dtype
from .blocks import Blocks
from .hadamard import kronecker, matrix
from .joint import Joint


class JointBlocks(Joint):
    """[D_1 H C_1 A_1; D_1 H C_2 A_1; ...; D_2 H C_1 A_2; ...]: the blocks of each tensor, not cropped; see Blocks.

    One transform serves all blocks. The signs D differ between tensors, so they are not in the Kronecker factors here
    but multiplied afterwards.
    """

    members: list[Blocks]

    @staticmethod
    def extent(member: Blocks) -> tuple[int, int]:
        return member.rows.n, member.size - member.last_block_rows

    def draw(self, device: torch.device) -> tuple:
        """Draw the state:

        all c_b, as each tensor holds them: [blocks, ...]; D: [tensors, 1, length]; the tensor of each block: [blocks];
        H_k: [tensors, k, k], with signs; the other Kronecker factors of H; the state of all A.
        """
        member = self.members[0]
        held = torch.cat([each.draw_held(device) for each in self.members])
        counts = torch.tensor([each.block_count for each in self.members], device=device)
        owners = torch.arange(len(counts), device=device).repeat_interleave(counts)
        H_k, *signed_factors = zip(*(each.draw_kronecker_factors(device) for each in self.members), strict=True)
        signs = torch.ones(len(counts), 1, device=device)
        for factors in signed_factors:
            column = torch.stack(factors)[:, :, 0]  # the first column of H is all ones, so that of D H is D
            signs = (signs.unsqueeze(2) * column.unsqueeze(1)).flatten(1)
        kronecker_factors = [matrix(size, device=device) for size in member.kronecker_sizes[1:]]
        inner = member.join_inner([each.draw_inner(device) for each in self.members])
        return held, signs.unsqueeze(1), owners, torch.stack(H_k), kronecker_factors, inner

    def apply(self, z: Tensor) -> Tensor:
        member, (held, signs, owners, H_k, kronecker_factors, inner) = self.members[0], self.state(z)
        v = member.inner(to_working_dtype(z).reshape(-1, 1, member.rows.d), *inner)
        if member.k > 1:
            v = H_k @ v.view(-1, len(self.members), member.k, member.length)
        v = v.view(-1, len(self.members), member.k, member.length).index_select(1, owners)
        v.mul_(member.coefficients(held).to(v.dtype).unsqueeze(1))
        y = kronecker(kronecker_factors, v).view(v.shape).mul_(signs.index_select(0, owners))
        return y.view(*z.shape[:-1], -1).to(z.dtype)

    def adjoint(self, grad: Tensor) -> Tensor:
        member, (held, signs, owners, H_k, kronecker_factors, inner) = self.members[0], self.state(grad)
        g = to_working_dtype(grad).reshape(-1, len(owners), member.k, member.length) * signs.index_select(0, owners)
        x = kronecker(kronecker_factors, g).view(g.shape)
        x.mul_(member.coefficients(held).to(x.dtype).unsqueeze(1))
        v = x.new_zeros(len(x), len(self.members), member.k, member.length).index_add_(1, owners, x)
        if member.k > 1:
            v = H_k.mT @ v
        v = member.inner_adjoint(v.view(-1, len(self.members), member.size), *inner)
        return v.sum(1).view(*grad.shape[:-1], -1).to(grad.dtype)
