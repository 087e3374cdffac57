"""Given projection: a basis or a mask, from a tensor, a dictionary, a file, a folder or a trajectory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from hashlib import blake2b
from math import prod

import torch
from peft import PeftConfig
from safetensors.torch import load_file
from torch import Tensor

from ..trajectory import Trajectory


GIVEN = {"basis": "basis", "coordinate": "mask"}
"""Projections that no seed can redraw -> the config field that gives them."""

ORTHONORMALITY = 1e-3
"""How far the Gram matrix of a basis may be from the identity, in its largest entry."""
HALF_ORTHONORMALITY = 2e-2
"""The same for a basis in half precision."""

_WAY_OUT = (
    "If the file has moved: config = SubspaceConfig.from_pretrained(adapter), config.basis = its new path, "
    "PeftModel.from_pretrained(model, adapter, config=config)."
)


@dataclass(frozen=True)
class Given:
    """A given P, checked and cut into the rows of each tensor."""

    d: int
    rows: dict[str, Tensor]  # basis: [n, d]; coordinate: sorted positions inside the tensor, int64 [k]
    digest: str | None = None  # the digest of the rows, if the adapter's file will not hold them


def stored_apart(config: PeftConfig) -> bool:
    """Whether the adapter's file leaves P out, and its config names a file that several adapters share."""
    return config.save_projection is False and isinstance(config.basis, (str, os.PathLike))


def read_given(config: PeftConfig, shapes: dict[str, tuple[int, ...]]) -> Given | None:
    """Read the basis or mask of the config, and cut it along the tensors; None if the config has none.

    Args:
        shapes: The shape of each projected tensor by its name, in the order of theta.

    Raises:
        ValueError: if its shape does not fit the tensors, it is not finite or not orthonormal, has fewer than d
            columns, or is not the one that the adapter was trained in.
    """
    field = GIVEN.get(config.projection, "")
    source = getattr(config, field, None)
    if source is None:
        return None
    if field == "mask":
        return _mask(config, _rows(field, _read(config, field, source), shapes))
    trajectory = _trajectory(source)
    if trajectory is None:
        given = _basis(config, _rows(field, _read(config, field, source), shapes))
    else:
        given = _basis(config, _rows(field, _components(trajectory, config, shapes), shapes), copy=False)
    if config.expected_basis_digest is None and not stored_apart(config):
        return given
    return Given(given.d, given.rows, _digest(config, given.rows))


def _trajectory(source) -> Trajectory | None:
    """The trajectory in this folder, if the folder holds samples and no basis file."""
    if not isinstance(source, (str, os.PathLike)) or os.path.exists(os.path.join(source, "basis.safetensors")):
        return None
    trajectory = Trajectory(source)
    return trajectory if len(trajectory) else None


def _read(config: PeftConfig, field: str, source) -> Tensor | dict[str, Tensor]:
    if isinstance(source, (str, os.PathLike)):
        path = os.fspath(source)
        path = os.path.join(path, "basis.safetensors") if os.path.isdir(path) else path
        if not os.path.isfile(path):
            raise ValueError(
                f"`basis` and `mask` must be a tensor or a safetensors file that exists, got {path!r}; a folder must "
                "hold `basis.safetensors` or, for a basis, the samples of a Trajectory."
                + (f" {_WAY_OUT}" if config.expected_basis_digest else "")
            )
        source = load_file(path)
    if isinstance(source, dict) and len(source) == 1 and set(source) <= {"basis", "mask"}:
        source = next(iter(source.values()))
    return source


def _components(trajectory: Trajectory, config: PeftConfig, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The first d principal components of the target tensors along a trajectory."""
    folder = str(trajectory.folder)
    if config.d is None:
        raise ValueError(f"`d` is needed for the trajectory in {folder!r}: set it to 1 or more, below its samples.")
    if config.save_projection is False:
        raise ValueError(
            f"`save_projection=False` needs a basis in a file of its own, {folder!r} holds a trajectory; write one "
            "with Trajectory(folder).save_basis(file, d) and give that file, or leave `save_projection` out."
        )
    recorded = trajectory.shapes
    for name, shape in shapes.items():
        if recorded.get(name, shape) != shape:
            raise ValueError(
                f"`{name}` must have the shape that the trajectory in {folder!r} recorded, {list(recorded[name])}, "
                f"got {list(shape)}; give the model that was recorded."
            )
    return trajectory.basis(config.d, names=shapes)


def _digest(config: PeftConfig, rows: dict[str, Tensor]) -> str:
    """32 hexadecimal digits for the names, dtypes, shapes and values of the columns that are used.

    Raises:
        ValueError: if the config says another.
    """
    content = blake2b(digest_size=16)
    for name, tensor in rows.items():
        content.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        content.update(tensor.cpu().view(-1).view(torch.uint8).numpy())
    digest, expected = content.hexdigest(), config.expected_basis_digest
    if expected not in (None, digest):
        source = config.basis if isinstance(config.basis, (str, os.PathLike)) else "the given tensor"
        raise ValueError(
            f"`basis` must be the one that the adapter was trained in: the first {config.d} columns of "
            f"{str(source)!r} have the digest {digest}, the adapter's config says {expected}. {_WAY_OUT}"
        )
    return digest


def _rows(field: str, tensors: Tensor | dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The given rows of each tensor, [n, ...], cut in the order of theta or taken by name."""
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
        name = min(set(tensors) ^ set(sizes))
        raise ValueError(
            f"`{field}` must have one entry for each target tensor and no other, but "
            f"{'has' if name in tensors else 'lacks'} one for `{name}`; check `target_modules` and `parameters`."
        )
    rows = {}
    for name, shape in shapes.items():
        trailing = tensors[name].shape[-1:] if field == "basis" else ()
        allowed = {(*shape, *trailing), (sizes[name], *trailing)}
        if tuple(tensors[name].shape) not in allowed:
            raise ValueError(
                f"`{field}` of `{name}` must be of shape {[*shape, *(['k'] if trailing else [])]}, got "
                f"{list(tensors[name].shape)}; give the rows of that tensor, in its shape or flat."
            )
        rows[name] = tensors[name].reshape(sizes[name], *trailing)
    return rows


def _basis(config: PeftConfig, rows: dict[str, Tensor], copy: bool = True) -> Given:
    widths = {tensor.shape[1] if tensor.ndim == 2 else 0 for tensor in rows.values()}
    if len(widths) != 1 or 0 in widths:
        raise ValueError(
            f"`basis` must be a matrix [D, k] with one k for all tensors, got k = {sorted(widths)}; give each tensor "
            "as many columns."
        )
    k = widths.pop()
    d = k if config.d is None else config.d
    if d > k:
        raise ValueError(f"`basis` must hold at least d = {d} columns, got {k}; lower `d` or give more columns.")
    for name, tensor in rows.items():
        if not tensor.is_floating_point():
            raise ValueError(
                f"`basis` must be finite floating numbers, that of `{name}` is {tensor.dtype}; convert it, "
                "`basis.float()`."
            )
    if copy:
        rows = {name: t[:, :d].detach().clone(memory_format=torch.contiguous_format) for name, t in rows.items()}
    gram = 0
    for name, tensor in rows.items():
        gram = gram + (part := _gram(tensor))
        if not part.diagonal().isfinite().all():
            raise ValueError(
                f"`basis` must be finite floating numbers, that of `{name}` has others; compute the basis again."
            )
    error = (gram - torch.eye(d, dtype=gram.dtype)).abs().max().item()
    is_full = all(tensor.dtype in (torch.float32, torch.float64) for tensor in rows.values())
    if error > (ORTHONORMALITY if is_full else HALF_ORTHONORMALITY):
        raise ValueError(
            f"`basis` must have orthonormal columns, its Gram matrix differs from the identity by {error:.2g}; "
            "orthonormalise it, for example with torch.linalg.qr."
        )
    return Given(d, rows)


def _gram(tensor: Tensor) -> Tensor:
    """The Gram matrix, float64 [d, d] on the CPU; in chunks, because a float64 copy of the whole may not fit."""
    chunks = (chunk.double() for chunk in tensor.split(2**15))
    return sum((chunk.T @ chunk).cpu() for chunk in chunks)


def _mask(config: PeftConfig, rows: dict[str, Tensor]) -> Given:
    for name, tensor in rows.items():
        if tensor.dtype != torch.bool:
            raise ValueError(f"`mask` must be boolean, that of `{name}` is {tensor.dtype}; convert it, `mask != 0`.")
    positions = {name: tensor.nonzero()[:, 0] for name, tensor in rows.items()}
    d = sum(map(len, positions.values()))
    if config.d not in (None, d):
        raise ValueError(f"`d` must equal the {d} entries that `mask` selects, got {config.d}; leave `d` out.")
    if d == 0:
        raise ValueError("`mask` must select at least one entry, got none; set one to True.")
    return Given(d, positions)
