"""Scale: what theta_d is multiplied by, so that P is normalised over all of D."""

from __future__ import annotations

from math import sqrt

import torch
from peft import PeftConfig
from torch import Tensor

from ..coordinates import Coordinates


def normalising_scale(config: PeftConfig, coordinates: dict[str, Coordinates]) -> Tensor | float:
    """The scale of an adapter, from the coordinates of all its target tensors.

    With `columns` it is 1 / |column of P|, float32 [d], or 1.0 if every column has norm 1. With `rows` it is the
    number that gives the rows that move a mean square norm of 1.
    """
    projections = [projection for c in coordinates.values() for projection in c.projections.values()]
    if config.normalization == "columns":
        squares = sum(projection.column_square_norms() for projection in projections)
        if bool((squares == 1).all()):
            return 1.0  # where d = D, one more product for each layer would cost more than the layers
        return squares.clamp_min(torch.finfo(torch.float64).tiny).rsqrt().float()
    return sqrt(
        sum(c.moves for c in coordinates.values()) / sum(projection.square_norm() for projection in projections)
    )
