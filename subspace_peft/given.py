"""Given columns of P: a basis or a mask, from a tensor, a dictionary, a safetensors file or a folder of one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import prod

import torch
from peft import PeftConfig
from safetensors.torch import load_file
from torch import Tensor


GIVEN = {"basis": "basis", "coordinate": "mask"}
"""Projections that a seed cannot redraw, and the config field that holds what they are made of."""

ORTHONORMALITY = 1e-3
"""How far the Gram matrix of a basis may be from the identity, in its largest entry."""


@dataclass(frozen=True)
class Given:
    """A given P, checked and cut into the rows of each tensor."""

    d: int
    rows: dict[str, Tensor]  # basis: [n, d]; coordinate: sorted positions inside the tensor, int64 [k]


def read_given(config: PeftConfig, shapes: dict[str, tuple[int, ...]]) -> Given | None:
    """The basis or mask of the config, cut along the tensors of these names and shapes; None if there is none to read.

    Raises:
        ValueError: if its shape is not that of the tensors, or it is not finite, or not orthonormal, or too narrow.
    """
    source = getattr(config, GIVEN.get(config.projection, ""), None)
    if source is None:
        return None
    rows = _rows(GIVEN[config.projection], _tensors(source), shapes)
    return _mask(config, rows) if config.projection == "coordinate" else _basis(config, rows)


def _tensors(source) -> Tensor | dict[str, Tensor]:
    if isinstance(source, (str, os.PathLike)):
        path = os.fspath(source)
        path = os.path.join(path, "basis.safetensors") if os.path.isdir(path) else path
        if not os.path.isfile(path):
            raise ValueError(f"`basis` and `mask` must be a tensor or a safetensors file that exists, got {path!r}.")
        source = load_file(path)
    if isinstance(source, dict) and len(source) == 1 and set(source) <= {"basis", "mask"}:
        source = next(iter(source.values()))
    return source


def _rows(field: str, tensors: Tensor | dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """One [n, ...] for each tensor: the given rows in the order of theta, or by name."""
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    D = sum(sizes.values())
    if isinstance(tensors, Tensor):
        if tensors.shape[:1] != (D,):
            raise ValueError(
                f"`{field}` must have one row for each of the D = {D} adapted entries, got shape "
                f"{list(tensors.shape)}; check `target_modules` and `parameters`."
            )
        return dict(zip(sizes, tensors.split(list(sizes.values())), strict=True))
    if set(tensors) != set(sizes):
        differs = sorted(set(tensors) ^ set(sizes))[0]
        raise ValueError(
            f"`{field}` must have one entry for each target tensor; `{differs}` is in only one of the two."
        )
    rows = {}
    for name, shape in shapes.items():
        trailing = tensors[name].shape[-1:] if field == "basis" else ()
        allowed = {(*shape, *trailing), (sizes[name], *trailing)}
        if tuple(tensors[name].shape) not in allowed:
            raise ValueError(
                f"`{field}` of `{name}` must be of shape {[*shape, *(['k'] if trailing else [])]}, got "
                f"{list(tensors[name].shape)}."
            )
        rows[name] = tensors[name].reshape(sizes[name], *trailing)
    return rows


def _basis(config: PeftConfig, rows: dict[str, Tensor]) -> Given:
    widths = {tensor.shape[1] if tensor.ndim == 2 else 0 for tensor in rows.values()}
    if len(widths) != 1 or 0 in widths:
        raise ValueError(f"`basis` must be a matrix [D, k] with one k, got k of {sorted(widths)}.")
    k = widths.pop()
    d = k if config.d is None else config.d
    if d > k:
        raise ValueError(f"`basis` must hold at least d = {d} columns, got {k}; lower `d` or give more columns.")
    rows = {name: tensor[:, :d].detach().clone(memory_format=torch.contiguous_format) for name, tensor in rows.items()}
    for name, tensor in rows.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"`basis` must be finite floating numbers, that of `{name}` is not ({tensor.dtype}).")
    gram = sum(tensor.double().T @ tensor.double() for tensor in rows.values())
    error = (gram - torch.eye(d, dtype=gram.dtype, device=gram.device)).abs().max().item()
    tolerance = ORTHONORMALITY if all(t.dtype in (torch.float32, torch.float64) for t in rows.values()) else 2e-2
    if error > tolerance:
        raise ValueError(
            f"`basis` must have orthonormal columns, its Gram matrix differs from the identity by {error:.2g}; "
            "orthonormalise it, for example with torch.linalg.qr."
        )
    return Given(d, rows)


def _mask(config: PeftConfig, rows: dict[str, Tensor]) -> Given:
    for name, tensor in rows.items():
        if tensor.dtype != torch.bool:
            raise ValueError(f"`mask` must be boolean, that of `{name}` is {tensor.dtype}; compare it, `mask != 0`.")
    positions = {name: tensor.nonzero()[:, 0] for name, tensor in rows.items()}
    d = sum(map(len, positions.values()))
    if config.d not in (None, d):
        raise ValueError(f"`d` must equal the {d} entries that `mask` selects, got {config.d}; leave `d` out.")
    if d == 0:
        raise ValueError("`mask` must select at least one entry, got none.")
    return Given(d, positions)
