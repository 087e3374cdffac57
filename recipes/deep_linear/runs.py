"""The command line of the scripts of this folder: runs that have no result, a table, a figure."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from recipes.lab.collected import Collected, Settings, conclude, spanned


FOLDER = Path(__file__).parent


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
    results = Collected(options.output / "results" / f"{options.settings.stem}.json")
    if not options.plot:
        results.carry_out(runs, measure, label=str)
    conclude(results, runs, text, plot, options.output / "plots" / f"{options.settings.stem}.png")


def _value(text: str) -> Any:
    """As in a YAML, but that 1e-3 is a number."""
    value = yaml.safe_load(text)
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
