"""The runs of a search as JSON lines, so that a search that was stopped can go on."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


VERSION = 1
KIND = "subspace_peft.measure"
PROPOSAL = {"d", "seed"}
RUN = PROPOSAL | {"metric", "seconds"}


class Proposal(NamedTuple):
    d: int
    seed: int


class Run(NamedTuple):
    d: int
    seed: int
    metric: float  # NaN where the run gave no finite number
    success: bool
    seconds: float


class SearchFile:
    """A header, and one line for each proposal and each run.

    A search with several workers writes its proposals, so that a run that did not end is made again with the same d
    and seed. With one worker they follow from the runs, and the file holds runs alone.

    Attributes:
        runs: Lines of runs (d, seed, metric, seconds), as they were read.
        proposals: Lines of proposals (d, seed), as they were read.

    Raises:
        ValueError: if the file is of another version or another search, or is damaged.
    """

    def __init__(self, path: Path, search: dict):
        self.path, header = path, _line({KIND: VERSION, **search})
        text = path.read_bytes() if path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]  # what follows is half a line of a process that was killed
        if not whole:
            if not header.startswith(text):
                raise _damaged(path, 1)
            path.write_bytes(header)
            whole = text = header
        first, *lines = whole.splitlines()
        _check_header(path, _parse(path, 1, first, lambda record: KIND in record), search)
        records = [_parse(path, at, line, _is_entry) for at, line in enumerate(lines, 2) if line.strip()]
        self.proposals = [record for record in records if "metric" not in record]
        runs = [record for record in records if "metric" in record]
        _check_seeds(path, runs, self.proposals)
        self.runs = [run | {"metric": math.nan if run["metric"] is None else run["metric"]} for run in runs]
        if whole != text:
            os.truncate(path, len(whole))

    def add_proposal(self, proposal: Proposal) -> None:
        self._append(proposal._asdict())

    def add_run(self, run: Run) -> None:
        metric = None if math.isnan(run.metric) else run.metric
        self._append({"d": run.d, "seed": run.seed, "metric": metric, "seconds": run.seconds})

    def _append(self, record: dict) -> None:
        with open(self.path, "ab", buffering=0) as file:  # one write: what a kill leaves is half of the last line
            file.write(_line(record))
            os.fsync(file.fileno())


def _line(record: dict) -> bytes:
    return json.dumps(record, allow_nan=False).encode() + b"\n"


def _parse(path: Path, at: int, line: bytes, fits: Callable[[dict], bool]) -> dict:
    try:
        record = json.loads(line)
    except ValueError:
        raise _damaged(path, at) from None
    if not isinstance(record, dict) or not fits(record):
        raise _damaged(path, at)
    return record


def _is_entry(record: dict) -> bool:
    return set(record) in (PROPOSAL, RUN) and all(isinstance(record[key], int) for key in PROPOSAL)


def _damaged(path: Path, at: int) -> ValueError:
    return ValueError(f"`file` must be that of a search, line {at} of {str(path)!r} is not; give another `file`.")


def _check_header(path: Path, header: dict, search: dict) -> None:
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


def _check_seeds(path: Path, runs: list[dict], proposals: list[dict]) -> None:
    """Seeds 0, 1, 2 ..., each proposed and run at most once, and at one d."""
    made, proposed = ({record["seed"]: record["d"] for record in records} for records in (runs, proposals))
    seeds = set(made) | set(proposed)
    once = len(made) == len(runs) and len(proposed) == len(proposals)
    if not once or seeds != set(range(len(seeds))) or made | proposed != proposed | made:
        raise ValueError(
            f"`file` must hold the runs of one search, each once, {str(path)!r} does not: two processes wrote to it "
            "at once; give another `file`, and give each process its own."
        )
