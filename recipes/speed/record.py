"""What the measurements of speed share: the option --threads, and the load of the machine beside the times."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from recipes.lab import measurement
from recipes.lab.measurement import at_least, with_load


FOLDER = Path(__file__).parent


def parser(description: str | None, threads: int = 0) -> measurement.Parser:
    parser = measurement.Parser(description, FOLDER)
    parser.add_argument("--threads", type=at_least(0), default=threads, help="of torch; 0: its own choice")
    return parser


def measured(name: str, options: argparse.Namespace, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What <output>/<name>.jsonl says, after measuring anew unless --report."""
    if options.threads:
        torch.set_num_threads(options.threads)
    file = options.output / f"{name}.jsonl"
    record = measurement.measured(file, options.report, lambda: with_load(measure))
    print(f"{file}\n")
    return record
