"""The runs of a search as JSON lines, one appended after every run, so that a search that was stopped goes on."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import NamedTuple


VERSION = 1
KIND = "subspace_peft.measure"


class Run(NamedTuple):
    d: int
    seed: int
    metric: float  # NaN where the run gave no finite number
    success: bool
    seconds: float


def open_file(path: Path, search: dict) -> list[dict]:
    """The runs of a search in its file, which is made if it is not there; half a line at its end is taken off.

    Raises:
        ValueError: if the file is of another version or another search, or is damaged.
    """
    text = path.read_bytes() if path.exists() else b""
    whole = text[: text.rfind(b"\n") + 1]
    if not whole:
        if text and not _line({KIND: VERSION, **search}).startswith(text):
            raise _damaged(path, 1)
        path.write_bytes(_line({KIND: VERSION, **search}))
        return []
    header, *lines = whole.splitlines()
    _check(path, _parse(path, 1, header, {KIND}), search)
    runs = [_parse(path, at, line, {"d", "seed", "metric", "seconds"}) for at, line in enumerate(lines, 2)]
    if [run["seed"] for run in runs] != list(range(len(runs))):
        raise ValueError(
            f"`file` must hold the runs of one search in turn, {str(path)!r} does not: two processes wrote to it at "
            "once; give another `file`, and each process its own."
        )
    if whole != text:
        os.truncate(path, len(whole))
    return [run | {"metric": math.nan if run["metric"] is None else run["metric"]} for run in runs]


def append(path: Path, run: Run) -> None:
    number = None if math.isnan(run.metric) else run.metric
    line = _line({"d": run.d, "seed": run.seed, "metric": number, "seconds": run.seconds})
    with open(path, "ab", buffering=0) as file:  # one write: the line is there, or a part of it that is taken off
        file.write(line)
        os.fsync(file.fileno())


def _line(record: dict) -> bytes:
    return json.dumps(record, allow_nan=False).encode() + b"\n"


def _parse(path: Path, at: int, line: bytes, keys: set[str]) -> dict:
    try:
        record = json.loads(line)
    except ValueError:
        raise _damaged(path, at) from None
    if not isinstance(record, dict) or not keys <= set(record):
        raise _damaged(path, at)
    return record


def _damaged(path: Path, at: int) -> ValueError:
    return ValueError(f"`file` must be that of a search, line {at} of {str(path)!r} is not; give another `file`.")


def _check(path: Path, header: dict, search: dict) -> None:
    version = header.pop(KIND)
    if version != VERSION:
        raise ValueError(
            f"`file` must be of version {VERSION}, {str(path)!r} is of version {version!r}; give another `file`, or "
            "read it with the version of subspace_peft that wrote it."
        )
    for key, value in search.items():
        if header.get(key) != value:
            raise ValueError(
                f"`file` must be of a search with `{key}` {value!r}, {str(path)!r} is of one with "
                f"{header.get(key)!r}; give another `file`."
            )
