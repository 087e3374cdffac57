"""Identity: every weight moves by its own number."""

import torch
from torch import Tensor

from .base import Block, Projection


class Identity(Projection):
    """P = I, d = D: this tensor's rows are `offset` to `offset + n`. Full fine-tuning, or LoRA with low_rank."""

    def __init__(self, block: Block):
        super().__init__(block)
        if block.offset + block.n > block.d:
            raise ValueError(
                f"`identity` has d = D: {block.name} ends at entry {block.offset + block.n}, but d = {block.d}."
            )

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
