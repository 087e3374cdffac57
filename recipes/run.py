"""The runs of a YAML file, their tables and their figure: one command for every kind of run.

    accelerate launch --config_file recipes/accelerate/cpu.yaml recipes/run.py recipes/intrinsic_dimension/digits.yaml
    python recipes/run.py <recipe>.yaml --d 10 20 --seed 0 --output <folder>
    python recipes/run.py <recipe>.yaml --workers 8
    python recipes/run.py <recipe>.yaml --workers 100 --executor slurm:slurm_partition=gpu,gpus_per_node=1
    python recipes/run.py <recipe>.yaml --report

Settings on the command line narrow the grid: a value that the file has selects the runs that have it, another value
takes the place of the file's. Results go to the recipe's folder, or to --output. Stop it and start it again: a run
that has a result is not run again, and several of these commands, on any machines that share the folder, share the
work. The processes of one `accelerate launch` train each run together, on the same global batches.
"""

import contextlib
import sys
from pathlib import Path
from typing import Any, NamedTuple


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipes.lab import command, search
from recipes.lab.executors import opened
from recipes.lab.grid import known_keys, load, read
from recipes.lab.kinds import DEFAULT, find_kind
from recipes.lab.results import Results, compact
from recipes.lab.sweep import Sweep, processes
from recipes.reports.conclude import all_runs, check, conclude
from recipes.reports.pages import write_pages


class Order(NamedTuple):
    """What a command line asks for."""

    file: Path
    output: Path
    workers: int
    executor: str | None
    report: bool
    compact: bool
    overrides: dict[str, Any]


def parse(arguments: list[str] | None = None) -> Order:
    """Raises ValueError for a setting that the recipe does not know, SystemExit for other faults."""
    parser = command.Parser(__doc__)
    parser.add_argument("file", type=Path, help="the recipe")
    parser.add_argument("--output", type=Path, help="where results, adapters and plots go; the recipe's folder")
    parser.add_argument("--workers", type=int, default=1, help="how many runs are made at a time")
    parser.add_argument("--executor", help="who makes them: processes, dask, slurm, or <module>:<function>")
    parser.add_argument("--report", action="store_true", help="write tables and figure of what is there, no runs")
    parser.add_argument("--compact", action="store_true", help="move the results into one file beside the recipe")
    parser.epilog = "Every setting of the recipe is an option too: --<setting> value [value ...]."
    known, rest = parser.parse_known_args(arguments)
    if known.workers < 1:
        raise ValueError(f"`--workers` must be at least 1, got {known.workers}.")
    recipe = load(known.file)
    kind = find_kind(recipe.pop("kind", DEFAULT))
    recipe.pop("report", None)
    overrides = command.settings(rest, known_keys(kind, recipe))
    output = (known.output or known.file.parent).absolute()  # workers may run in another folder
    return Order(known.file, output, known.workers, known.executor, known.report, known.compact, overrides)


def main(arguments: list[str] | None = None) -> None:
    order = parse(arguments)
    recipe, results = read(order.file, order.overrides), Results(order.output)
    check(recipe)
    figure = order.output / "plots" / f"{order.file.stem}.png"
    if not order.report and not order.compact:
        _carry_out(order, recipe, results)
    if processes().is_main_process:
        if order.compact:
            runs = [*Sweep(recipe.kind, recipe.runs, order.output).runs, *all_runs(recipe, results), *recipe.searches]
            file = order.output / f"{order.file.stem}.jsonl"
            print(f"{compact(results, runs, file)} results moved to {file}")
        elif not conclude(recipe, results, figure) and order.report:
            raise ValueError(
                f"A report needs results, {order.file.name} has none in {str(order.output)!r} yet; leave --report out "
                "to make them."
            )
        if order.report and not order.overrides and order.output == order.file.parent.absolute():
            write_pages(order.file)
    processes().destroy_process_group()


def _carry_out(order: Order, recipe: Any, results: Results) -> None:
    alone = order.workers == 1 and order.executor is None
    if not alone and processes().num_processes > 1:
        raise ValueError(
            f"`--workers` and `--executor` must be left out where {processes().num_processes} processes train each "
            f"run together, got {order.workers} and {order.executor}."
        )
    try:
        order.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"`--output` must be a folder, got {str(order.output)!r}: {error.strerror}.") from None
    sweep = Sweep(recipe.kind, recipe.runs, order.output)
    busy = sweep.all_wanted() or [request for request in recipe.searches if not results.has(request)]
    place = contextlib.nullcontext()
    if busy and not alone:
        place = opened(order.executor or "processes", order.workers, order.output)
    try:
        with place as executor:
            sweep.carry_out(executor, order.workers)
            search.carry_out(recipe.searches, recipe.kind, order.output, executor, order.workers)
    finally:
        if processes().is_main_process:
            results.drop_abandoned()


if __name__ == "__main__":
    command.run(main)
