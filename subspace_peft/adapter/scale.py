"""Scale: what theta_d is multiplied by, so that P is normalised over all of D."""

from __future__ import annotations

from math import sqrt

import torch
from peft import PeftConfig
from torch import Tensor

from ..coordinates import Coordinates


def normalising_scale(config: PeftConfig, coordinates: dict[str, Coordinates]) -> Tensor | float:
    """The scale of an adapter, from the coordinates of all its target tensors.

    With `columns` it is 1 / |column of P|, float32 [d], or 1.0 if every column has norm 1; a column of zeros, which
    `sparse` and several terms a row can have, stays as it is. With `rows` it is the number that gives the rows that
    move a mean square norm of 1.

    Raises:
        ValueError: if P is zero.
    """
    projections = [projection for c in coordinates.values() for projection in c.projections.values()]
    by_column = config.normalization == "columns"
    squares = torch.as_tensor(sum(p.column_square_norms() if by_column else p.square_norm() for p in projections))
    if not squares.any():
        raise ValueError(
            f"P must move something, it is zero for d = {config.d}, nnz_per_row = {config.nnz_per_row} and seed = "
            f"{config.seed}; take another seed, a larger `d`, or nnz_per_row=1."
        )
    if by_column:
        if bool((squares == 1).all()):
            return 1.0  # where d = D, one more product for each layer would cost more than the layers
        return squares.where(squares > 0, 1).rsqrt().float()
    return sqrt(sum(c.moves for c in coordinates.values()) / squares.item())
