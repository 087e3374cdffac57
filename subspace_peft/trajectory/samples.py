"""Samples of a trajectory: safetensors files, written whole or not at all, read as one matrix in chunks of rows."""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path

import torch
from torch import Tensor


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
BUFFER_DTYPES = DTYPES | INTEGERS | {"BOOL": torch.bool, "C64": torch.complex64}
BUFFERS = "buffers"  # the key of their names in the metadata of a file
READ_BYTES = 2**26
"""Bytes that are read at once, of all samples together."""
CHUNK_BYTES = 2**23
"""Bytes that are multiplied at once: they stay in the cache of a processor."""


@dataclass(frozen=True)
class Entry:
    """Where one tensor is in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # byte of the file


def write_tensors(
    path: Path,
    kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]],
    chunks: Iterable[Tensor],
    buffers: Collection[str] = (),
) -> None:
    """Write a safetensors file, of tensors that need not be in memory together; it gets its name once it is complete.

    Args:
        kinds: dtype and shape of each tensor.
        chunks: The entries of the tensors in that order; where a chunk ends does not matter.
        buffers: The names of those that are buffers; the file lists them in its metadata.

    Raises:
        ValueError: if a dtype is not in `DTYPES`, or that of a buffer not in `BUFFER_DTYPES`.
    """
    codes, end = {dtype: code for code, dtype in BUFFER_DTYPES.items()}, 0
    header = {"__metadata__": {BUFFERS: json.dumps(list(buffers))}} if buffers else {}
    for name, (dtype, shape) in kinds.items():
        allowed = (BUFFER_DTYPES if name in buffers else DTYPES).values()
        if dtype not in allowed:
            raise ValueError(
                f"A tensor of a trajectory must be of {', '.join(map(str, allowed))}, `{name}` is {dtype}; convert it."
            )
        start, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with open(unfinished, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for chunk in chunks:  # copied: FSDP resizes storages, which torch refuses once NumPy has seen them
                file.write(_bytes(chunk.detach().to("cpu", copy=True).contiguous().view(-1)))
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file but its buffers, and where they are in it.

    Raises:
        ValueError: if the file is damaged or incomplete.
    """
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length <= size - 8 else {}
        buffers = json.loads(header.pop("__metadata__", {}).get(BUFFERS, "[]"))
        entries, end = {}, 0
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            dtype = (BUFFER_DTYPES if name in buffers else DTYPES)[entry["dtype"]]
            entries[name] = Entry(dtype, tuple(entry["shape"]), 8 + length + start)
            complete = stop - start == prod(entries[name].shape) * dtype.itemsize
            end = max(end, 8 + length + stop) if complete else size + 1
        for name in buffers:
            del entries[name]
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
        paths: One file a sample.
        names: The tensors that are entries of the matrix, in this order; all of them if None.

    Raises:
        ValueError: if a file is damaged, is of another model than the first, or lacks one of the names.
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
                    f"`{name}` must be in the samples to have a basis, but {str(paths[0].parent)!r} holds "
                    f"{len(first)} other tensors, such as {next(iter(first))!r}; a trajectory holds the parameters "
                    "that train: leave this tensor out of the targets, or record it."
                )
        self.shapes = {name: first[name] for name in names or first}
        self._ends = list(accumulate(map(prod, self.shapes.values())))

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def D(self) -> int:
        return self._ends[-1]

    def spans(self, first: int, n: int) -> Iterator[tuple[str, slice, slice]]:
        """Entries first to first + n of theta, tensor by tensor: name, slice of the tensor, slice of the n entries."""
        names, at = list(self.shapes), first
        for k in range(bisect_right(self._ends, first), len(names)):
            if at >= first + n:
                return
            begin, stop = self._ends[k] - prod(self.shapes[names[k]]), min(self._ends[k], first + n)
            if stop > at:
                yield names[k], slice(at - begin, stop - begin), slice(at - first, stop - first)
            at = stop

    def chunks(self, memory: int, beside: int = 0) -> Iterator[tuple[int, Tensor]]:
        """For each chunk of n entries of theta the first one, and w_0, w_1 - w_0, ..., w_(t-1) - w_0: float64 [t, n].

        Differences lose fewer digits, because weights move little relative to their size. All chunks use the same
        memory.

        Args:
            memory: Bytes to use at most.
            beside: Bytes for each entry that the caller uses.

        Raises:
            ValueError: if one entry of all samples does not fit into `memory`.
        """
        t, dtypes = len(self), {header[name].dtype for header in self._headers for name in self.shapes}
        dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        read_per_entry, chunk_per_entry = t * dtype.itemsize + 8, 8 * t + beside
        read = min(memory // 2, READ_BYTES) // read_per_entry
        size = min(memory // 2, CHUNK_BYTES) // chunk_per_entry
        if not read or not size:
            raise ValueError(
                f"`memory` must be at least {2 * max(read_per_entry, chunk_per_entry)} bytes for {t} samples, got "
                f"{memory}; raise it."
            )
        read, size = min(read, self.D), min(size, read, self.D)
        rows, buffer = torch.empty(t, read, dtype=dtype), torch.empty(t, size, dtype=torch.float64)
        for first in range(0, self.D, read):
            n = min(read, self.D - first)
            for sample in range(t):
                self._read(sample, first, rows[sample, :n])
            for start in range(0, n, size):
                chunk = buffer[:, : min(size, n - start)]
                chunk.copy_(rows[:, start : start + chunk.shape[1]])
                chunk[1:] -= chunk[0]
                yield first + start, chunk

    def _read(self, sample: int, first: int, out: Tensor) -> None:
        """Read entries of theta from `first` on into `out`."""
        with open(self.paths[sample], "rb") as file:
            for name, inside, among in self.spans(first, len(out)):
                entry = self._headers[sample][name]
                same = entry.dtype == out.dtype
                raw = out[among] if same else torch.empty(inside.stop - inside.start, dtype=entry.dtype)
                file.seek(entry.start + inside.start * entry.dtype.itemsize)
                if file.readinto(_bytes(raw)) != raw.nbytes:
                    raise ValueError(
                        f"A sample must not change while it is read, {str(self.paths[sample])!r} became shorter; "
                        "start again once nothing writes to it."
                    )
                if not same:
                    out[among] = raw

    def describe_not_finite(self, memory: int) -> str:
        """The first tensor that is not finite, and its file, in words."""
        for path in self.paths:
            sample = Samples([path], self.shapes)
            for first, chunk in sample.chunks(memory):
                for name, _, among in sample.spans(first, chunk.shape[1]):
                    if not chunk[:, among].isfinite().all():
                        return f"`{name}` of {str(path)!r}"
        return "a difference of two samples"


def _shape(entry: Entry | None) -> str:
    return "absent" if entry is None else f"of shape {list(entry.shape)}"
