"""Identity: every weight moves by its own entry of theta_d."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base import JointCache, Projection, TensorRows
from .recorded import is_recorded


class SplitCache(JointCache):
    """theta_d, split once for all tensors.

    The backward pass of one split makes one vector of D entries; that of a slice for each tensor makes one such vector
    for each.
    """

    def __init__(self, members: Sequence[Identity]):
        self.members = list(members)
        self._key: tuple[int, ...] = ()
        self._entries: dict[Identity, Tensor] = {}
        for member in members:
            member.joint_cache = self

    def normalised(self, theta_d, scale):
        return None

    def entries(self, theta_d, member):
        """The entries of one tensor; None if theta_d is not the parameter that trains, as inside torch.func."""
        if type(theta_d) is not nn.Parameter or not (theta_d.requires_grad and torch.is_grad_enabled()):
            return None
        if is_recorded():
            return None
        key = (id(theta_d), theta_d.data_ptr(), theta_d._version)  # every step of an optimiser changes it
        if key != self._key:
            parts = theta_d.split([each.rows.n for each in self.members])
            self._key, self._entries = key, dict(zip(self.members, parts, strict=True))
        return self._entries[member]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_key": (), "_entries": {}}


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
        return SplitCache(projections)

    def apply(self, theta_d: Tensor) -> Tensor:
        # a copy: the output of an autograd Function must not be a view of its input
        return theta_d.narrow(-1, self.rows.offset, self.rows.n).clone()

    def adjoint(self, grad: Tensor) -> Tensor:
        after = self.rows.d - self.rows.offset - self.rows.n
        return torch.nn.functional.pad(grad, (self.rows.offset, after))

    def square_norm(self) -> float:
        return float(self.moved)

    def column_square_norms(self) -> Tensor:
        norms = torch.zeros(self.rows.d, dtype=torch.float64)
        norms[self.rows.offset : self.rows.offset + self.rows.n] = 1
        return norms
