"""Results: one JSON a run while work goes on, JSON Lines once it is done, and one reader for both.

    <output>/results/<name>.json    a run, written when it ends; <name>.lock beside it while it is under way
    <output>/<recipe>.jsonl         the runs of a YAML, compacted, a line each: what is under version control

The name is that of the run's settings. Any number of processes, on any machines that share the folder, take the next
run that has neither a result nor a lock.
"""

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from recipes.lab import environment
from recipes.lab.locks import Lock
from recipes.lab.settings import Run


class Results:
    """The results in one output folder."""

    def __init__(self, output: Path):
        self.output, self.folder = output, output / "results"
        self._compacted: dict[Path, tuple[int, dict[str, Any]]] = {}  # lines by name, and when they were written

    def path(self, run: Run) -> Path:
        return self.folder / f"{run.name}.json"

    def has(self, run: Run) -> bool:
        return self.path(run).exists() or run.name in self.compacted()

    def load(self, run: Run) -> dict[str, Any]:
        """The result, empty if there is none.

        Raises:
            ValueError: if the file is damaged.
        """
        path, compacted = self.path(run), self.compacted()
        if not path.exists() and run.name not in compacted:
            return {}
        try:
            result = json.loads(path.read_text()) if path.exists() else compacted[run.name]
        except (json.JSONDecodeError, OSError) as error:
            raise ValueError(
                f"A result must be JSON, got {str(path)!r}: {error}; delete it, to run it again."
            ) from None
        if not isinstance(result, dict) or "settings" not in result:
            raise ValueError(f"A result must hold its `settings`, that of {run} does not; delete it, to run it again.")
        return result

    def records(self, runs: Iterable[Run]) -> list[dict[str, Any]]:
        """The results of those runs that have one, in their order."""
        return [result for run in runs if (result := self.load(run))]

    def compacted(self) -> dict[str, dict[str, Any]]:
        """The results in the JSON Lines files, by name."""
        for file in self.output.glob("*.jsonl"):
            written = file.stat().st_mtime_ns
            if self._compacted.get(file, (None,))[0] != written:
                self._compacted[file] = written, dict(read_lines(file))
        return {name: result for _, lines in self._compacted.values() for name, result in lines.items()}

    def write(self, run: Run, result: dict[str, Any]) -> None:
        """All of the result or nothing, whenever the process is stopped. The lock must be held."""
        draft = self._lock(run).folder / "result"
        draft.write_text(json.dumps({"settings": run.record(), **result}, indent=1, allow_nan=False) + "\n")
        draft.replace(self.path(run))

    def take(self, run: Run) -> bool:
        """Whether this process now holds the run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return self._lock(run).take()

    def held(self, run: Run) -> bool:
        """Whether a process holds the run."""
        return self._lock(run).held()

    def release(self, run: Run) -> None:
        self._lock(run).release()

    def drop_abandoned(self) -> None:
        """Remove the locks of processes that are no more."""
        for folder in self.folder.glob("*.lock"):
            Lock(folder).drop_abandoned()
        with contextlib.suppress(OSError):  # another command may just use the folder
            self.folder.rmdir()

    def _lock(self, run: Run) -> Lock:
        return Lock(self.folder / f"{run.name}.lock")


def compact(results: Results, runs: Iterable[Run], file: Path) -> int:
    """Move the results of these runs into `file`, JSON Lines in the order of their names; how many were moved.

    Of a run that another file of the folder already holds, the line there is replaced: recipes share runs. Every other
    line is left as it is.
    """
    moved = {run.name: run for run in runs if results.path(run).exists()}
    files = {each: dict(read_lines(each)) for each in (file, *sorted(results.output.glob("*.jsonl"))) if each.exists()}
    changed: dict[Path, dict[str, Any]] = {}
    for name, run in moved.items():
        holder = next((each for each, lines in files.items() if name in lines), file)
        changed.setdefault(holder, files.get(holder, {}))[name] = results.load(run)
    for holder, lines in changed.items():
        draft = holder.with_suffix(".draft")
        draft.write_text("".join(as_line(name, lines[name]) for name in sorted(lines)), encoding="utf-8")
        draft.replace(holder)
    for run in moved.values():
        results.path(run).unlink()
    results.drop_abandoned()
    return len(moved)


def as_line(name: str, result: dict[str, Any]) -> str:
    return json.dumps({"name": name, **result}, allow_nan=False, separators=(",", ":"), ensure_ascii=False) + "\n"


def read_lines(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """Name and result of each line.

    Raises:
        ValueError: if a line is damaged.
    """
    lines = []
    for number, line in enumerate(file.read_text(encoding="utf-8").removesuffix("\n").split("\n"), 1):
        try:
            result = json.loads(line)
            lines.append((result.pop("name"), result))
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(
                f"Line {number} of {str(file)!r} must be a result in JSON with a `name`, {error}; delete the line, to "
                "run it again."
            ) from None
    return lines


def write_measurement(file: Path, measured: dict[str, Any]) -> None:
    """What a script measured, and what with, as the one line of a JSON Lines file, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".draft")
    draft.write_text(as_line(file.stem, {**measured, **environment.record()}), encoding="utf-8")
    draft.replace(file)


def read_measurement(file: Path) -> dict[str, Any]:
    """The reverse of `write_measurement`.

    Raises:
        ValueError: if there is no such file, or it is damaged.
    """
    if not file.exists():
        raise ValueError(f"A measurement must be there to be reported, {str(file)!r} is not; make it first.")
    lines = read_lines(file)
    if len(lines) != 1:
        raise ValueError(f"A measurement must be one line, {str(file)!r} has {len(lines)}; delete it to redo it.")
    return lines[0][1]


def digits(values: Any, n: int = 4) -> Any:
    """Tensors and lists as lists of numbers of n digits, since people read results too; NaN is null."""
    if isinstance(values, torch.Tensor):
        return digits(values.tolist(), n)
    if isinstance(values, (list, tuple)):
        return [digits(each, n) for each in values]
    return float(f"{values:.{n}g}") if values == values else None
