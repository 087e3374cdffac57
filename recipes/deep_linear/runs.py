"""The runs that a YAML of settings spans, and their results in one JSON: a run that is there is not made again.

    d: 30
    runs:
      - {eps: [1, 0.1], seed: [0, 1]}

A list is an axis of the grid; `runs` holds sub-grids, each over the values above it; the command line wins over both.
"""

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from recipes import environment


Settings = dict[str, Any]
FOLDER = Path(__file__).parent


def spanned(file: Path, changes: Settings) -> list[Settings]:
    """All runs of a YAML, each once.

    Raises:
        ValueError: if a change is of a setting that the YAML does not have.
    """
    recipe = yaml.safe_load(file.read_text())
    grids = recipe.pop("runs", [{}])
    known = {key for grid in (recipe, *grids) for key in grid}
    if unknown := changes.keys() - known:
        raise ValueError(f"`--set` must name settings of {file.name}, got {sorted(unknown)}; it has {sorted(known)}.")
    found = []
    for grid in grids:
        axes = {key: each if isinstance(each, list) else [each] for key, each in (recipe | grid | changes).items()}
        found += [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]
    return [run for i, run in enumerate(found) if run not in found[:i]]


class Results:
    """A list of runs, each with its settings and what it was made with.

    Raises:
        ValueError: if the file is damaged.
    """

    def __init__(self, file: Path):
        self.file = file
        try:
            self.runs = json.loads(file.read_text())["runs"] if file.exists() else []
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(f"A result must be JSON of runs, {str(file)!r} is damaged; delete it.") from None

    def of(self, runs: list[Settings]) -> list[dict[str, Any]]:
        """The results of these runs that are there, in their order."""
        by = {json.dumps(each["settings"], sort_keys=True): each for each in self.runs}
        keys = [json.dumps(run, sort_keys=True) for run in runs]
        return [by[key] for key in keys if key in by]

    def add(self, settings: Settings, result: dict[str, Any]) -> None:
        """All of the result or nothing, whenever the process is stopped."""
        self.runs.append({"settings": settings, **result, **environment.record()})
        self.file.parent.mkdir(parents=True, exist_ok=True)
        draft = self.file.with_suffix(".tmp")
        lines = ",\n".join(json.dumps(run, allow_nan=False) for run in self.runs)
        draft.write_text(f'{{"runs": [\n{lines}\n]}}\n')
        os.replace(draft, self.file)


def main(
    measure: Callable[[Settings], dict[str, Any]],
    text: Callable[[list[dict[str, Any]]], str],
    plot: Callable[[list[dict[str, Any]], Path], Path],
    default: str,
    doc: str,
    arguments: list[str] | None = None,
) -> None:
    """Make the runs that are missing, print the table, draw the figure."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=Path, nargs="?", default=FOLDER / "settings" / f"{default}.yaml")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings that win over the YAML's")
    parser.add_argument("--output", type=Path, default=FOLDER)
    parser.add_argument("--plot", action="store_true", help="table and figure of what is there, no runs")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # matrices this small are not faster on more, and the seconds are those of one core
    if wrong := [each for each in options.set if "=" not in each]:
        parser.error(f"--set takes KEY=VALUE, got {wrong[0]!r}")
    changes = {key: _value(text) for key, _, text in (each.partition("=") for each in options.set)}
    runs = spanned(options.settings, changes)
    results = Results(options.output / "results" / f"{options.settings.stem}.json")
    for i, run in enumerate(() if options.plot else runs):
        if not results.of([run]):
            print(f"run {i + 1} of {len(runs)}: {run}")
            results.add(run, measure(run))
    found = results.of(runs)
    if not found:
        sys.exit(f"No run of {options.settings} has a result in {results.file} yet; leave --plot out to make them.")
    print(text(found))
    print(plot(found, options.output / "plots" / f"{options.settings.stem}.png"))


def _value(text: str) -> Any:
    """As in a YAML, but that 1e-3 is a number."""
    value = yaml.safe_load(text)
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def digits(values: Any, n: int = 4) -> Any:
    """Numbers of n digits, for a file that is read by people too; NaN is null."""
    if isinstance(values, torch.Tensor):
        return digits(values.tolist(), n)
    if isinstance(values, (list, tuple)):
        return [digits(each, n) for each in values]
    return float(f"{values:.{n}g}") if values == values else None
