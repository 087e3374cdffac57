"""One run or a sweep from a YAML file.

    accelerate launch --config_file recipes/accelerate/cpu.yaml recipes/run.py recipes/intrinsic_dimension/digits.yaml
    ... recipes/run.py <recipe>.yaml --d 10 20 --seed 0 --output <folder>

The command line wins over the file; several values are an axis of the grid in both. Results go to the recipe's folder,
or to --output. Stop it and start it again: a run that has a result is not run again, and several of these commands, on
any machines that share the folder, share the work. The processes of one `accelerate launch` train each run together,
on the same global batches.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipes import environment, summary
from recipes.data import load
from recipes.plots import plot
from recipes.results import Results
from recipes.settings import Settings, check_keys, read
from recipes.train import train


def parse(arguments: list[str] | None = None) -> tuple[Path, Path, dict[str, list[str]]]:
    """The recipe's file, the output folder, and the settings that the command line overrides."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("file", type=Path, help="the recipe")
    parser.add_argument("--output", type=Path, help="where results, adapters and plots go; the recipe's folder")
    for setting in fields(Settings):
        parser.add_argument(f"--{setting.name}", nargs="+", default=argparse.SUPPRESS, help=f"{setting.default!r}")
    known, unknown = parser.parse_known_args(arguments)
    check_keys(word.removeprefix("--") for word in unknown)
    overrides = vars(known)
    file, output = overrides.pop("file"), overrides.pop("output")
    return file, output or file.parent, overrides


def sweep(runs: list[Settings], results: Results, adapters: Path, accelerator: Accelerator) -> None:
    """Does every run that has no result and that no other process holds."""
    missing = decided(accelerator, lambda: [run for run in runs if not results.path(run).exists()])
    total, left = (sum(run.epochs for run in part) for part in (runs, missing))
    data = cache(lambda *source: [load(*source, split).to(accelerator.device) for split in ("train", "test")])
    quiet = not accelerator.is_main_process
    with tqdm(total=total, initial=total - left, unit="epoch", smoothing=0, mininterval=1, disable=quiet) as bar:

        def report(accuracy: float) -> None:
            bar.set_postfix(accuracy=f"{100 * accuracy:.2f}", refresh=False)
            bar.update()

        for run in missing:
            bar.set_description(str(run), refresh=False)
            bar.set_postfix()
            if run.threads:
                torch.set_num_threads(run.threads)
            if not decided(accelerator, lambda run=run: results.take(run)):
                bar.update(run.epochs)
                continue
            try:
                folder = adapters / run.name if run.save_adapter else None
                result = train(run, accelerator, *data(run.dataset, run.data), folder, report)
                if accelerator.is_main_process:
                    results.write(run, result | environment.record())
            finally:
                if accelerator.is_main_process:
                    results.release(run)


def decided(accelerator: Accelerator, decide: Callable[[], Any]) -> Any:
    """What the main process decides, on every process."""
    return broadcast_object_list([decide() if accelerator.is_main_process else None])[0]


def conclude(runs: list[Settings], results: Results, adapters: Path) -> pd.DataFrame:
    """Prints what all results so far say, and the proofs of the saved adapters."""
    table = results.table(runs)
    if len(table) < len(runs):
        print(f"\n{len(runs) - len(table)} of {len(runs)} runs are still held by other processes.")
    print(f"\n{summary.text(table)}\n")
    for run in runs:
        proof = results.load(run).get("adapter") if run.save_adapter else None
        if proof:
            print(f"saved adapter: {adapters / run.name}, {proof['bytes']} bytes of weights")
            equal = "outputs equal" if proof["max_difference"] == 0 else "OUTPUTS DIFFER"
            print(f"reloaded adapter: {equal} (max difference {proof['max_difference']})")
    return table


def main(arguments: list[str] | None = None) -> None:
    file, output, overrides = parse(arguments)
    runs, published = read(file, overrides)
    results = Results(output / "results")
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    sweep(runs, results, output / "adapters", accelerator)
    if accelerator.is_main_process:
        table = conclude(runs, results, output / "adapters")
        print(f"figure: {plot(table, published, output / 'plots' / f'{file.stem}.png')}")
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Stopped: the same command does what is missing.")
