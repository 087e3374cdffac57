"""Bases, masks and trajectories that adapters of the MLP are given."""

from __future__ import annotations

from math import prod
from pathlib import Path

import torch
from peft import get_peft_model
from torch import Tensor, nn

from subspace_peft import Trajectory
from subspace_peft.adapter.walk import unique_coordinates
from tests.cases import BY_NAME, dense_P, refused, settings
from tests.trajectory.walks import SHAPES, D


CASE = BY_NAME["mlp"]


def orthonormal(k: int = 5, rows: int = D) -> Tensor:
    """Orthonormal columns [rows, k]."""
    return torch.linalg.qr(torch.randn(rows, k, generator=torch.Generator().manual_seed(4)))[0].contiguous()


def cut(matrix: Tensor) -> dict[str, Tensor]:
    """A basis [D, k] or a mask [D] by tensor."""
    sizes = [prod(shape) for shape in SHAPES.values()]
    return dict(zip(SHAPES, matrix.split(sizes), strict=True))


def random_mask() -> Tensor:
    """About a fifth of the entries."""
    return torch.rand(D, generator=torch.Generator().manual_seed(5)) < 0.2


def stacked_P(model: nn.Module) -> Tensor:
    """P, its rows in the order of theta: [D, d]."""
    P = dense_P(model)
    return torch.cat([P[name] for name in unique_coordinates(model, "default")])


def refuse(message: str, **changes) -> None:
    """Assert that wrapping the MLP with these settings is a ValueError, and leaves it as it was."""
    model = CASE.model()
    with refused(model, message):
        get_peft_model(model, settings(**changes))


def walk(folder: Path, t: int = 6) -> Trajectory:
    """A trajectory of t samples of all parameters of the MLP."""
    trajectory, model = Trajectory(folder), CASE.model()
    for i in range(t):
        trajectory.add(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    return trajectory
