"""Identity: every weight moves by its own number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base import JointCache, Projection, TensorRows


class Cuts(JointCache):
    """theta_d cut for all tensors at once.

    The derivative of one cut is one vector of D; that of a cut for each tensor is a vector of D for each tensor.
    """

    def __init__(self, members: Sequence[Identity]):
        self.members = list(members)
        self._cut_at: tuple[int, ...] = ()
        self._pieces: dict[Identity, Tensor] = {}
        for member in members:
            member.joint_cache = self

    def normalised(self, theta_d, scale):
        return None

    def piece(self, theta_d, member):
        """The entries of a tensor; None where theta_d is not the vector that trains, as in torch.func."""
        if type(theta_d) is not nn.Parameter or not (theta_d.requires_grad and torch.is_grad_enabled()):
            return None
        if torch.compiler.is_compiling():
            return None
        now = (id(theta_d), theta_d.data_ptr(), theta_d._version)  # another after each step of an optimiser
        if now != self._cut_at:
            pieces = theta_d.split([one.rows.n for one in self.members])
            self._cut_at, self._pieces = now, dict(zip(self.members, pieces, strict=True))
        return self._pieces[member]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_cut_at": (), "_pieces": {}}


class Identity(Projection):
    """P = I, d = D: this tensor's rows are `offset` to `offset + n`. Full fine-tuning, or LoRA with low_rank."""

    def __init__(self, rows: TensorRows):
        super().__init__(rows)
        if rows.offset + rows.n > rows.d:
            raise ValueError(
                f"`identity` has d = D: {rows.name} ends at entry {rows.offset + rows.n}, but d = {rows.d}."
            )

    @classmethod
    def together(cls, projections):
        return Cuts(projections)

    def apply(self, theta_d: Tensor) -> Tensor:
        # a copy: the output of a Function must not be a view of its input
        return theta_d.narrow(-1, self.rows.offset, self.rows.n).clone()

    def adjoint(self, grad: Tensor) -> Tensor:
        after = self.rows.d - self.rows.offset - self.rows.n
        return torch.nn.functional.pad(grad, (self.rows.offset, after))

    def column_square_norms(self) -> Tensor:
        norms = torch.zeros(self.rows.d, dtype=torch.float64)
        norms[self.rows.offset : self.rows.offset + self.rows.n] = 1
        return norms
