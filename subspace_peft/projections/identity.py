"""Identity: every weight moves by its own number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base import Block, Pieces, Projection


class Cuts(Pieces):
    """theta_d cut for all tensors at once.

    The derivative of one cut is one vector of D; that of a cut for each tensor is a vector of D for each tensor.
    """

    def __init__(self, members: Sequence[Identity]):
        self.members = list(members)
        self._cut_at: tuple[int, ...] = ()
        self._pieces: dict[Identity, Tensor] = {}
        for member in members:
            member.pieces = self

    def normalised(self, theta_d, factor):
        return None

    def piece(self, theta_d, member):
        """The entries of a tensor; None where theta_d is not the vector that trains, as in torch.func."""
        if type(theta_d) is not nn.Parameter or not (theta_d.requires_grad and torch.is_grad_enabled()):
            return None
        if torch.compiler.is_compiling():
            return None
        now = (id(theta_d), theta_d.data_ptr(), theta_d._version)  # another after each step of an optimiser
        if now != self._cut_at:
            pieces = theta_d.split([one.block.n for one in self.members])
            self._cut_at, self._pieces = now, dict(zip(self.members, pieces, strict=True))
        return self._pieces[member]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_cut_at": (), "_pieces": {}}


class Identity(Projection):
    """P = I, d = D: this tensor's rows are `offset` to `offset + n`. Full fine-tuning, or LoRA with low_rank."""

    def __init__(self, block: Block):
        super().__init__(block)
        if block.offset + block.n > block.d:
            raise ValueError(
                f"`identity` has d = D: {block.name} ends at entry {block.offset + block.n}, but d = {block.d}."
            )

    @classmethod
    def together(cls, projections):
        return Cuts(projections)

    def apply(self, theta_d: Tensor) -> Tensor:
        # a copy: the output of a Function must not be a view of its input
        return theta_d.narrow(-1, self.block.offset, self.block.n).clone()

    def adjoint(self, grad: Tensor) -> Tensor:
        after = self.block.d - self.block.offset - self.block.n
        return torch.nn.functional.pad(grad, (self.block.offset, after))

    def column_square_norms(self) -> Tensor:
        norms = torch.zeros(self.block.d, dtype=torch.float64)
        norms[self.block.offset : self.block.offset + self.block.n] = 1
        return norms
