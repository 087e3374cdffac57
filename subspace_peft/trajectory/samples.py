"""Samples of a trajectory: safetensors files, written whole or not at all, read as one matrix in chunks of rows."""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path

import torch
from torch import Tensor


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
READ, WORK = 2**26, 2**23
"""Bytes of all samples read at once, and multiplied at once: the latter stay in the cache of a processor."""


@dataclass(frozen=True)
class Entry:
    """Where one tensor is in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # byte of the file


def write_tensors(path: Path, kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]], pieces: Iterable[Tensor]) -> None:
    """A safetensors file of tensors that need not be in memory together, under its name once it is whole.

    Args:
        kinds: dtype and shape of each tensor.
        pieces: Their entries in that order, cut anywhere.

    Raises:
        ValueError: if a dtype is none of `DTYPES`.
    """
    codes, header, end = {dtype: code for code, dtype in DTYPES.items()}, {}, 0
    for name, (dtype, shape) in kinds.items():
        if dtype not in codes:
            raise ValueError(
                f"A tensor of a trajectory must be of {', '.join(map(str, codes))}, `{name}` is {dtype}; convert it."
            )
        start, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with open(unfinished, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for piece in pieces:  # copied: a storage that numpy has seen can never be resized, which FSDP does
                file.write(_bytes(piece.detach().to("cpu", copy=True).contiguous().view(-1)))
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_header(path: Path) -> dict[str, Entry]:
    """What is where in a safetensors file.

    Raises:
        ValueError: if the file is damaged or not all there.
    """
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length <= size - 8 else {}
        header.pop("__metadata__", None)
        entries, end = {}, 0
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            entries[name] = Entry(DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + start)
            whole = stop - start == prod(entries[name].shape) * entries[name].dtype.itemsize
            end = max(end, 8 + length + stop) if whole else size + 1
    except (ValueError, KeyError, TypeError, AttributeError):
        entries, end = {}, -1
    if not entries or end != size:
        raise ValueError(
            f"A sample must be a whole safetensors file of floating tensors, {str(path)!r} of {size} bytes is damaged "
            "or half-written; delete it, and record that step again if it is needed."
        )
    return entries


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(torch.uint8).numpy())


class Samples:
    """The matrix of t samples of D entries, one row a sample, that is never in memory as a whole.

    Args:
        paths: One file each.
        names: The tensors that count, in this order; all if None.

    Raises:
        ValueError: if a file is damaged, or of another model than the first, or lacks a name.
    """

    def __init__(self, paths: list[Path], names: Iterable[str] | None = None):
        self.paths, self._headers = paths, [read_header(path) for path in paths]
        first = {name: entry.shape for name, entry in self._headers[0].items()}
        for path, header in zip(paths, self._headers, strict=True):
            for name in [*first, *header]:
                if name not in first or name not in header or header[name].shape != first[name]:
                    raise ValueError(
                        f"All samples must be of one model: `{name}` is {_shape(self._headers[0].get(name))} in "
                        f"{paths[0].name!r} and {_shape(header.get(name))} in {str(path)!r}; record each model in a "
                        "folder of its own."
                    )
        for name in names or ():
            if name not in first:
                raise ValueError(
                    f"`{name}` must be in the samples to have a basis, and {str(paths[0].parent)!r} holds "
                    f"{len(first)} other tensors, {next(iter(first))!r} among them; a trajectory holds what trained: "
                    "leave it out of the targets, or record it."
                )
        self.shapes = {name: first[name] for name in names or first}
        self._ends = list(accumulate(map(prod, self.shapes.values())))

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def D(self) -> int:
        return self._ends[-1]

    def pieces(self, first: int, n: int) -> Iterator[tuple[str, slice, slice]]:
        """Entries first to first + n of theta: by tensor, where they are in it, and where among the n."""
        names, at = list(self.shapes), first
        for k in range(bisect_right(self._ends, first), len(names)):
            if at >= first + n:
                return
            begin, stop = self._ends[k] - prod(self.shapes[names[k]]), min(self._ends[k], first + n)
            if stop > at:
                yield names[k], slice(at - begin, stop - begin), slice(at - first, stop - first)
            at = stop

    def chunks(self, memory: int, beside: int = 0) -> Iterator[tuple[int, Tensor]]:
        """The first of some entries of theta, and their w_0, w_1 - w_0, ..., w_(t-1) - w_0: float64 [t, n].

        Differences, since weights move little beside their size. The memory of a chunk is used again for the next.

        Args:
            beside: Bytes an entry that the caller uses.

        Raises:
            ValueError: if one entry of all samples does not fit into `memory`.
        """
        t, dtypes = len(self), {header[name].dtype for header in self._headers for name in self.shapes}
        dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        per_read, per_product = t * dtype.itemsize + 8, 8 * t + beside
        read, product = min(memory // 2, READ) // per_read, min(memory // 2, WORK) // per_product
        if not read or not product:
            raise ValueError(
                f"`memory` must be at least {2 * max(per_read, per_product)} bytes for {t} samples, got {memory}; "
                "raise it."
            )
        read, product = min(read, self.D), min(product, read, self.D)
        block, buffer = torch.empty(t, read, dtype=dtype), torch.empty(t, product, dtype=torch.float64)
        for first in range(0, self.D, read):
            n = min(read, self.D - first)
            for row in range(t):
                self._read(row, first, block[row, :n])
            for start in range(0, n, product):
                chunk = buffer[:, : min(product, n - start)]
                chunk.copy_(block[:, start : start + chunk.shape[1]])
                chunk[1:] -= chunk[0]
                yield first + start, chunk

    def _read(self, row: int, first: int, out: Tensor) -> None:
        with open(self.paths[row], "rb") as file:
            for name, inside, among in self.pieces(first, len(out)):
                entry = self._headers[row][name]
                same = entry.dtype == out.dtype
                raw = out[among] if same else torch.empty(inside.stop - inside.start, dtype=entry.dtype)
                file.seek(entry.start + inside.start * entry.dtype.itemsize)
                if file.readinto(_bytes(raw)) != raw.nbytes:
                    raise ValueError(f"{str(self.paths[row])!r} became shorter while it was read; do not write to it.")
                if not same:
                    out[among] = raw

    def not_finite(self, memory: int) -> str:
        """The first tensor that is not finite, and its file, in words."""
        for path in self.paths:
            one = Samples([path], self.shapes)
            for first, chunk in one.chunks(memory):
                for name, _, among in one.pieces(first, chunk.shape[1]):
                    if not chunk[:, among].isfinite().all():
                        return f"`{name}` of {str(path)!r}"
        return "a difference of two samples"


def _shape(entry: Entry | None) -> str:
    return "absent" if entry is None else f"of shape {list(entry.shape)}"
