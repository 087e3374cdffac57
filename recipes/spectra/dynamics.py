"""Measurements of weights that training moves: singular values and subspaces, and the increment."""

from typing import Any

import torch
from torch import Tensor, nn

from recipes.lab.results import digits
from recipes.lab.settings import PlainSettings
from recipes.spectra.networks import accuracy
from recipes.tasks.data import Split
from subspace_peft.spectra import BLOCKS, SIDES, Spectra, matrices


def watched(model: nn.Module, settings: PlainSettings) -> dict[str, Tensor]:
    return {name: matrix.clone() for name, matrix in matrices(model, settings["weights"])}


def dynamics(seen: dict[int, dict[str, Tensor]], K: int, reference: int) -> dict[str, Any]:
    """By weight, a list over steps each; see the README for what they say."""
    spectra = Spectra(rank=K, reference=reference)
    for step, weights in seen.items():
        spectra.add(weights, step)
    found = {}
    for name in spectra.weights:
        shape, values = seen[0][name].shape, spectra.singular_values(name)
        q = min(shape)
        kept = sorted({*range(min(2 * K, q)), *range(0, q, max(1, q // 40)), *range(max(0, q - 2 * K), q)})
        increments = [(weights[name] - seen[0][name]).double() for weights in seen.values()]
        found[name] = {
            "shape": list(shape),
            "kept": kept,
            "singular_values": digits(values[:, kept]),
            "change": digits([each.norm() / seen[0][name].norm() for each in increments]),
            "turned": {side: turned(spectra, name, side) for side in SIDES},
            **of_increments(increments, K),
        }
    return found


def turned(spectra: Spectra, name: str, side: str) -> dict[str, Any]:
    """By block the largest principal angle, and sum of sin^2 of all: how many of its directions left it."""
    found = {}
    for block in BLOCKS:
        angles = spectra.angles(name, side, block)
        if angles.shape[1]:
            found[block] = {"largest": digits(angles.amax(1)), "gone": digits(angles.sin().square().sum(1))}
    return found


def of_increments(increments: list[Tensor], K: int) -> dict[str, Any]:
    """Of W(t) - W(0): its first 3K singular values, and shares of its square.

    In its first K and 2K directions; `known`: what the last one has inside the 2K left and 2K right directions of
    that at t. `directions`: how many hold 90 % and 99 % of the last. `gaussian`: a normal matrix in place of it.
    """
    last, found = increments[-1], {"increment": [], "share_K": [], "share_2K": [], "known": []}
    for each in increments[1:]:
        U, sigma, Vh = torch.linalg.svd(each, full_matrices=False)
        share = sigma.square().cumsum(0) / sigma.square().sum()
        inside = U[:, : 2 * K].mT @ last @ Vh[: 2 * K].mT
        parts = (sigma[: 3 * K], share[:K][-1], share[: 2 * K][-1], (inside.norm() / last.norm()).square())
        for key, part in zip(found, parts, strict=True):
            found[key].append(digits(part))
    directions = {f"{level:.0%}": int((share < level).sum()) + 1 for level in (0.9, 0.99)}
    normal = torch.randn(last.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = torch.linalg.svdvals(normal).square()
    gaussian = {key: digits(noise[:n].sum() / noise.sum()) for key, n in (("share_K", K), ("share_2K", 2 * K))}
    return found | {"directions": directions | {"K": K, "2K": 2 * K}, "gaussian": gaussian}


@torch.no_grad()
def truncated(
    model: nn.Module, name: str, start: Tensor, directions: dict[str, int], test: Split, settings: PlainSettings
) -> dict[str, float]:
    """Test accuracy with only the first directions of this weight's increment, and all else as trained."""
    weight = model.get_parameter(name)
    trained = weight.clone()
    U, sigma, Vh = torch.linalg.svd((trained.reshape(start.shape) - start).double(), full_matrices=False)
    found = {}
    for n in sorted({0, *directions.values()}):
        weight.copy_((start + (U[:, :n] * sigma[:n] @ Vh[:n]).to(start.dtype)).view_as(weight))
        found[str(n)] = accuracy(model, test, settings)
    weight.copy_(trained)
    return found
