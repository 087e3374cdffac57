"""Fingerprint: the digits by which an adapter's files recognise their base model, and each other."""

from __future__ import annotations

import json
from hashlib import blake2b

import torch
from peft import PeftConfig
from torch import Tensor

from ..coordinates.base import Shape


IDENTITY = ("fingerprint", "D", "d", "projection", "coordinates", "rank", "alpha", "seed", "normalization")
IDENTITY += ("nnz_per_row", "projection_version")
LATER = ("replace_weight", "start", "factors", "gamma")
"""Part of the identity only where they differ from their defaults: older files have a mark made without them."""

DIGITS = 8  # of each target tensor

ROUNDING, HALF_ROUNDING = 1e-2, 0.5
"""How far averages of equal marks, computed in float32 or in half precision, may be from the mark."""


def fingerprint(shapes: dict[str, Shape]) -> str:
    """Eight hexadecimal digits for the name, shape and padding of each target tensor, in their order."""
    return "".join(
        blake2b(f"{name} {shape}".encode(), digest_size=DIGITS // 2).hexdigest() for name, shape in shapes.items()
    )


def in_order_of(expected: str, shapes: dict[str, Shape]) -> dict[str, Shape]:
    """The target tensors in the order of this fingerprint, if they are the same: a model can list its modules anew."""
    places = {expected[at : at + DIGITS]: at for at in range(0, len(expected), DIGITS)}
    ordered = dict(sorted(shapes.items(), key=lambda item: places.get(fingerprint(dict([item])), len(expected))))
    return ordered if fingerprint(ordered) == expected else shapes


def check_fingerprint(expected: str, shapes: dict[str, Shape]) -> None:
    """Compare the target tensors with those of the base model that the adapter was trained on.

    Raises:
        ValueError: if they differ; it names the first tensor that does.
    """
    actual = fingerprint(shapes)
    if actual == expected:
        return
    starts = range(0, max(len(actual), len(expected)), DIGITS)
    first = next((at for at in starts if actual[at : at + DIGITS] != expected[at : at + DIGITS]), 0)
    names, count = list(shapes), len(expected) // DIGITS
    if first // DIGITS < len(names):
        name = names[first // DIGITS]
        difference = f"the first target tensor that differs is `{name}` of shape {shapes[name]}"
    else:
        difference = f"this model ends after `{names[-1]}`, the adapter's base had {count - len(names)} more"
    raise ValueError(
        f"An adapter must be loaded onto the base model it was trained on: {difference} (of {count} target tensors "
        f"there and {len(names)} here); load the right base model, or say in `renamed` what its modules were called "
        "then, or train a new adapter."
    )


def identity(config: PeftConfig) -> str:
    """Everything that P and its use depend on, as JSON."""
    return json.dumps({field: getattr(config, field) for field in (*IDENTITY, *_later(config))})


def _later(config: PeftConfig) -> list[str]:
    return [field for field in LATER if getattr(config, field) != getattr(type(config), field)]


def _described(config: PeftConfig) -> str:
    """The identity in a message, without the digits of the base."""
    values = ((field, getattr(config, field)) for field in (*IDENTITY[1:], *_later(config)))
    return ", ".join(f"{field} = {value}" for field, value in values if value is not None)


def mark(config: PeftConfig) -> Tensor:
    """The identity in 64 bits, which the file with the weights holds: its bytes as float32 [8], from 0 to 255.

    They are floats because federated learning averages every tensor of a file: the average of equal marks is the mark.
    """
    digest = blake2b(identity(config).encode(), digest_size=8).digest()
    return torch.tensor(list(digest), dtype=torch.float32)


def check_mark(saved: Tensor, config: PeftConfig) -> None:
    """Compare the mark in a file, or the average of several, with that of the adapter it is loaded into.

    Raises:
        ValueError: if they differ by more than averaging rounds.
    """
    if saved.dtype == torch.int64:  # the same bytes, as version 0.1 wrote them
        saved = saved.cpu().view(torch.uint8)
    tolerance = HALF_ROUNDING if saved.itemsize == 2 else ROUNDING
    saved, expected = saved.detach().to("cpu", torch.float64), mark(config)
    if saved.shape == expected.shape and (saved - expected).abs().max() < tolerance:
        return
    if ((saved - saved.round()).abs() >= tolerance).any():
        raise ValueError(
            "Adapters must share one P to be averaged, but the mark in this average is one of different marks: some "
            "were trained with another seed, d, projection or base than the one it is loaded into "
            f"({_described(config)}); start each of them from this config, on this base. If they were, the average "
            "was rounded: compute it in float64."
        )
    raise ValueError(
        f"The adapter file must belong to the adapter it is loaded into ({_described(config)}): its theta_d was "
        "trained with another seed, d, projection or base; load it under another adapter name, or resume with a model "
        "that has its own adapter_config.json; if it is an average in half precision, compute it in float64."
    )
