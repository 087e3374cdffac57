"""The runs that a YAML of plain values spans, and their results together in one JSON.

    d: 30
    runs:
      - {eps: [1, 0.1], seed: [0, 1]}

A list is an axis of the grid; `runs` holds sub-grids, each over the values above it; changes win over both.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from recipes.lab import environment
from recipes.lab.axes import points
from recipes.lab.locks import Lock
from recipes.lab.named import digest
from recipes.lab.sharing import carry_out


Settings = dict[str, Any]


def spanned(file: Path, changes: Settings | None = None, defaults: Settings | None = None) -> list[Settings]:
    """All runs of a YAML, each once.

    Raises:
        ValueError: if a change is of a setting that the YAML does not have.
    """
    recipe, changes = yaml.safe_load(file.read_text()), changes or {}
    grids = recipe.pop("runs", [{}])
    known = {key for grid in (recipe, *grids) for key in grid}
    if unknown := changes.keys() - known:
        raise ValueError(f"`--set` must name settings of {file.name}, got {sorted(unknown)}; it has {sorted(known)}.")
    found = [run for grid in grids for run in points((defaults or {}) | recipe | grid | changes)]
    return [run for i, run in enumerate(found) if run not in found[:i]]


class Collected:
    """A list of runs, each with its settings and what it was made with, and a lock for each that is under way.

    Raises:
        ValueError: if the file is damaged.
    """

    def __init__(self, file: Path):
        self.file = file
        self.runs = self._read()

    def of(self, runs: list[Settings]) -> list[dict[str, Any]]:
        """The results of these runs that are there, in their order."""
        by = {digest(each["settings"]): each for each in self.runs}
        names = map(digest, runs)
        return [by[name] for name in names if name in by]

    def carry_out(self, runs: list[Settings], measure: Callable[[Settings], dict[str, Any]], label: Callable) -> None:
        """Every run that has no result and that no other process holds."""

        def do(run: Settings) -> None:
            print(f"run {runs.index(run) + 1} of {len(runs)}: {label(run)}", flush=True)
            self.add(run, measure(run))

        self.file.parent.mkdir(parents=True, exist_ok=True)
        carry_out(runs, self, do)
        self.runs = self._read()
        if missing := len(runs) - len(self.of(runs)):
            print(f"{missing} of {len(runs)} runs are held by other processes.")

    def has(self, settings: Settings) -> bool:
        self.runs = self._read()
        return bool(self.of([settings]))

    def take(self, settings: Settings) -> bool:
        return self._lock(settings).take()

    def release(self, settings: Settings) -> None:
        self._lock(settings).release()

    def add(self, settings: Settings, result: dict[str, Any]) -> None:
        """All of the result or nothing, whenever the process is stopped, beside those of other processes."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        lock = Lock(self.file.with_suffix(".lock"))
        with lock.waited_for():
            self.runs = [*self._read(), {"settings": settings, **result, **environment.record()}]
            lines = ",\n".join(json.dumps(run, allow_nan=False) for run in self.runs)
            draft = lock.folder / "results"
            draft.write_text(f'{{"runs": [\n{lines}\n]}}\n')
            draft.replace(self.file)

    def _read(self) -> list[dict[str, Any]]:
        try:
            return json.loads(self.file.read_text())["runs"] if self.file.exists() else []
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(f"A result must be JSON of runs, {str(self.file)!r} is damaged; delete it.") from None

    def _lock(self, settings: Settings) -> Lock:
        return Lock(self.file.with_suffix(f".{digest(settings)}.lock"))


def conclude(
    results: Collected,
    runs: list[Settings],
    text: Callable[[list[dict[str, Any]]], str],
    plot: Callable[[list[dict[str, Any]], Path], Path],
    figure: Path,
) -> None:
    """Prints the table and draws the figure of the results that are there."""
    found = results.of(runs)
    if not found:
        sys.exit(f"No run of {figure.stem}.yaml has a result in {results.file} yet; leave --plot out to make them.")
    print(text(found))
    print(plot(found, figure))


def digits(values: Any, n: int = 4) -> Any:
    """Numbers of n digits, for a file that is read by people too; NaN is null."""
    if isinstance(values, torch.Tensor):
        return digits(values.tolist(), n)
    if isinstance(values, (list, tuple)):
        return [digits(each, n) for each in values]
    return float(f"{values:.{n}g}") if values == values else None
