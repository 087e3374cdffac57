"""Measurement: a script that measures something once, unlike the runs of a grid, and the command line of it.

    python recipes/<recipe>/<script>.py [options]     measure, keep the result, report it
    python recipes/<recipe>/<script>.py --report      report the result that is there

The result is the one line of <output>/<name>.jsonl, beside the code that measured it unless --output says otherwise.
"""

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recipes.lab import command
from recipes.lab.grid import read
from recipes.lab.results import read_measurement, write_measurement


class Parser(command.Parser):
    """The command line of a script that measures.

    Args:
        description: The docstring of the script.
        output: The default of --output; None: the script takes the folder of its YAML.
    """

    def __init__(self, description: str | None, output: Path | None = None):
        super().__init__(description)
        self.add_argument("--output", type=folder, default=output, help="for result and figure; the recipe's folder")
        self.add_argument("--report", action="store_true", help="report the result that is there, measure nothing")


def folder(word: str) -> Path:
    """The `type` of an option that is a folder, there already or to be made."""
    if (path := Path(word)).exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a folder, got the file {word!r}")
    return path


def at_least(least: int) -> Callable[[str], int]:
    """The `type` of an option that is an integer of at least this value."""

    def integer(word: str) -> int:
        if not word.isdecimal() or int(word) < least:
            raise argparse.ArgumentTypeError(f"must be an integer of at least {least}, got {word!r}")
        return int(word)

    return integer


def positive(word: str) -> float:
    """The `type` of an option that is a number above 0."""
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {word!r}")
    return value


def measured(file: Path, report: bool, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the file says, after measuring anew unless `report`.

    Raises:
        ValueError: if there is nothing to report, or the file is damaged.
    """
    if not report:
        write_measurement(file, measure())
    return read_measurement(file)


def runs_of(file: Path, kind: str, overrides: dict[str, Any] | None = None) -> list[Any]:
    """The runs of a YAML, narrowed by the command line.

    Raises:
        ValueError: if the file is no recipe, or its runs are of another kind.
    """
    recipe = read(file, overrides)
    if recipe.kind.name != kind:
        raise ValueError(
            f"The recipe must have runs of kind {kind!r}, those of {str(file)!r} are {recipe.kind.name!r}."
        )
    return recipe.runs


def with_load(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is measured, and the load of the machine before and after, which tells how far its times can be trusted."""
    before = os.getloadavg()
    record = {**measure(), "load": {"before": before, "after": os.getloadavg()}}
    print("load before {:.1f}, after {:.1f}".format(*(load[0] for load in record["load"].values())))
    return record
