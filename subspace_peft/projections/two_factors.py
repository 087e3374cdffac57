"""TwoFactors: blocks (F_1 ⊗ F_2) diag(c_b) v_j for many b, without a pass over memory for the diagonal.

Of F_2 and each row p of v, M_p[q, q'] = v[p, q] F_2[q', q] is one small matrix for all blocks. So

    y_b = F_1 [c_b[0] M_0; c_b[1] M_1; ...]

takes two products for all blocks at once, and its transpose two with the sum over the blocks in them.
"""

import torch
from torch import Tensor


class TwoFactors:
    """The blocks of one tensor.

    Args:
        k: How many v_j each block has: all with its c_b, one after the other.
    """

    def __init__(self, F_1: Tensor, F_2: Tensor, k: int):
        self.F_1, self.F_2, self.k = F_1, F_2, k
        self.a, self.b = len(F_1), len(F_2)

    def matrices(self, v: Tensor) -> Tensor:
        """M_p of all v_j side by side: k * a * b entries -> [a, b, k b]."""
        v = v.view(self.k, self.a, self.b).permute(1, 2, 0).unsqueeze(-1)
        return (v * self.F_2.t().unsqueeze(1)).reshape(self.a, self.b, -1)

    def blocks(self, M: Tensor, c: Tensor, out: Tensor, origin: Tensor | None) -> None:
        """Write the blocks of c [blocks, a b], plus an origin, to `out`, which has as many entries."""
        rows = torch.bmm(c.view(-1, self.a, self.b).transpose(0, 1), M)
        rows = rows.view(self.a, -1, self.b).transpose(0, 1)
        F_1, out = self.F_1.expand(len(rows), -1, -1), out.view(-1, self.a, self.b)
        if origin is None:
            torch.bmm(F_1, rows, out=out)
        else:
            torch.baddbmm(origin.view(-1, self.a, self.b), F_1, rows, out=out)

    def add_adjoint(self, total: Tensor, c: Tensor, g: Tensor) -> None:
        """Add to `total` [k, a, b, b] what `adjoint` makes the adjoint of blocks g from."""
        rows = torch.bmm(self.F_1.t().expand(len(c) * self.k, -1, -1), g.view(-1, self.a, self.b))
        rows, c = rows.view(-1, self.k, self.a, self.b), c.view(-1, self.a, self.b).permute(1, 2, 0)
        for j in range(self.k):
            total[j].baddbmm_(c, rows[:, j].transpose(0, 1))

    def adjoint(self, total: Tensor) -> Tensor:
        """The sum over the blocks of diag(c_b) (F_1 ⊗ F_2)ᵀ g_b: [1, k, a b]."""
        return (total * self.F_2.t()).sum(-1).view(1, self.k, -1)
