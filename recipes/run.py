"""One run or a sweep from a YAML file.

    accelerate launch --config_file recipes/accelerate/cpu.yaml recipes/run.py recipes/intrinsic_dimension/digits.yaml
    ... recipes/run.py <recipe>.yaml --d 10 20 --seed 0 --output <folder>

The command line wins over the file; several values are an axis of the grid in both. Results go to the recipe's folder,
or to --output. Stop it and start it again: a run that has a result is not run again, and several of these commands, on
any machines that share the folder, share the work; --workers starts some on this machine. The processes of one
`accelerate launch` train each run together, on the same global batches.
"""

import argparse
import itertools
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipes.lab import environment, search
from recipes.lab.grid import SEARCH, TRAJECTORY, check_keys, known_keys, read
from recipes.lab.results import Results
from recipes.lab.sharing import carry_out, decided, helped_by, take
from recipes.reports.report import conclude
from recipes.tasks.data import load
from recipes.training.settings import Settings
from recipes.training.together import alike, train_together
from recipes.training.train import train
from subspace_peft import Trajectory


WAIT = 2.0
"""Seconds between looks at a trajectory that another process is recording."""


def parse(arguments: list[str] | None = None) -> tuple[Path, Path, int, dict[str, list[str]]]:
    """The recipe's file, the output folder, the workers, and the settings that the command line overrides."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("file", type=Path, help="the recipe")
    parser.add_argument("--output", type=Path, help="where results, adapters and plots go; the recipe's folder")
    shared = "processes that share the runs, each of `threads`; 0: this one helps others, without a report"
    parser.add_argument("--workers", type=int, default=1, help=shared)
    for key in [*known_keys(), *SEARCH]:
        default = getattr(Settings, key.removeprefix(TRAJECTORY), None)
        parser.add_argument(f"--{key}", nargs="+", default=argparse.SUPPRESS, help=f"{default!r}")
    known, unknown = parser.parse_known_args(arguments)
    check_keys(word.removeprefix("--") for word in unknown)
    overrides = vars(known)
    file, output, workers = (overrides.pop(key) for key in ("file", "output", "workers"))
    return file, output or file.parent, workers, overrides


class Sweep:
    """The runs of a recipe, and the trajectories that their bases are made of."""

    def __init__(self, runs: list[Settings], output: Path, accelerator: Accelerator, data: Callable | None = None):
        self.accelerator = accelerator
        self.results = Results(output / "results")
        self.adapters, self.trajectories = output / "adapters", output / "trajectories"
        sampled = [run.trajectory for run in runs if run.trajectory]
        self.sampled = {run.name for run in sampled} | {run.name for run in runs if run.save_trajectory}
        self.runs = list({run.name: run for run in [*sampled, *runs]}.values())
        self.followers: dict[str, list[Settings]] = {}  # of a trajectory, by the name of the run that records it
        for run in self.runs:
            if run.trajectory:
                self.followers.setdefault(run.trajectory.name, []).append(run)
        self.data = data or cache(lambda *source: [load(*source, s).to(accelerator.device) for s in ("train", "test")])

    def wanted(self, run: Settings) -> bool:
        """Whether it has no result, or its trajectory is not there and is to be, or another run waits for it."""
        if not self.results.has(run):
            return True
        if (
            run.save_trajectory
            and len(Trajectory(self.trajectories / run.name)) <= (not run.sample_steps) * run.epochs
        ):
            return True
        return any(not self.results.has(other) and not self.ready(other) for other in self.followers.get(run.name, ()))

    def ready(self, run: Settings) -> bool:
        """Whether the trajectory that a run's basis is made of is there as far as it is needed."""
        if not run.trajectory:
            return True
        return run.last_sample in Trajectory(self.trajectories / run.trajectory.name).steps

    def carry_out(self, keep_bar: bool = True) -> None:
        """Does every run that is wanted and that no other process holds, and waits for trajectories from those."""
        wanted = self.decided(self.all_wanted)
        quiet = not self.accelerator.is_main_process
        total = sum(run.epochs for run in self.runs)
        look = {"unit": "epoch", "smoothing": 0, "mininterval": 1, "disable": quiet, "leave": keep_bar}
        with tqdm(total=total, initial=self.epochs_done(), **look) as bar:
            while wanted:
                runs = [run for run in self.runs if run.name in wanted]
                if not carry_out(runs, self.results, partial(self.do, bar=bar), self.free, self.accelerator):
                    if self.decided(lambda runs=runs: all(map(self.ready, runs))):
                        return  # the rest is with other processes
                    time.sleep(WAIT)
                wanted = self.decided(self.all_wanted)

    def all_wanted(self) -> list[str]:
        return [run.name for run in self.runs if self.wanted(run)]

    def epochs_done(self) -> int:
        """By all processes."""
        return sum(run.epochs for run in self.runs if not self.wanted(run))

    def free(self, run: Settings) -> bool:
        return self.ready(run) and self.wanted(run)

    def do(self, run: Settings, bar: tqdm) -> None:
        """A run that this process holds, and others with it where they are trained together."""

        def report(accuracy: float) -> None:
            bar.set_postfix(accuracy=f"{100 * accuracy:.2f}", refresh=False)
            bar.update()

        if run.threads:
            torch.set_num_threads(run.threads)
        group = [run]
        try:
            group.extend(self.company(run))
            if not bar.disable:
                bar.n = self.epochs_done()
            bar.set_description(f"{run}" + (f" and {len(group) - 1} like it" if group[1:] else ""), refresh=False)
            bar.set_postfix()
            for one, result in zip(group, self.results_of(group, report), strict=True):
                if self.accelerator.is_main_process and not self.results.has(one):
                    self.results.write(one, result | environment.record())
            self.check_trajectory(run)
        finally:
            if self.accelerator.is_main_process:
                for one in group[1:]:
                    self.results.release(one)

    def company(self, run: Settings) -> Iterator[Settings]:
        """The runs that are trained together with one, each now with this process too."""
        shared = alike(run)
        if run.together < 2 or shared is None or self.accelerator.num_processes > 1:
            return iter(())
        others = (other for other in self.runs if other != run and alike(other) == shared)
        return itertools.islice((other for other in others if take(other, self.results, self.free)), run.together - 1)

    def results_of(self, group: list[Settings], report: Callable[[float], None]) -> list[dict[str, Any]]:
        run, data = group[0], self.data(group[0].dataset, group[0].data)
        if len(group) > 1:
            return train_together(group, self.accelerator, *data, report)
        adapter = self.adapters / run.name if run.save_adapter else None
        accelerator = Accelerator(cpu=not torch.accelerator.is_available())  # it holds what it prepares, for good
        return [train(run, accelerator, *data, adapter, self.trajectory(run), report)]

    def trajectory(self, run: Settings) -> Path | None:
        """The folder of samples that a run writes or reads."""
        name = run.trajectory.name if run.trajectory else run.name
        return self.trajectories / name if name in self.sampled else None

    def accuracy(self, run: Settings) -> float:
        """The final test accuracy of a run, which is made unless it has a result; another process may be at it."""
        while not self.decided(lambda: self.results.has(run)):
            Sweep([run], self.results.folder.parent, self.accelerator, self.data).carry_out(keep_bar=False)
            if not self.results.has(run):
                time.sleep(WAIT)
        return self.decided(lambda: self.results.load(run)["final_accuracy"])

    def check_trajectory(self, run: Settings) -> None:
        """Whether the runs that wait for the trajectory just recorded now have their samples."""
        recorded = max(Trajectory(self.trajectories / run.name).steps, default=0)
        for other in self.followers.get(run.name, ()):
            if other.last_sample > recorded:
                raise ValueError(
                    f"`samples` must be at most the {recorded} of the trajectory, got {other.last_sample}: {other}; "
                    "give the trajectory more `epochs`, or fewer `sample_steps`."
                )

    def decided(self, decide: Callable[[], Any]) -> Any:
        """What the main process decides, on every process."""
        return decided(decide, self.accelerator)


def main(arguments: list[str] | None = None) -> None:
    file, output, workers, overrides = parse(arguments)
    recipe = read(file, overrides)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    if workers < 0 or (workers > 1 and accelerator.num_processes > 1):
        raise ValueError(
            "`--workers` must be at least 1, and 1 where several processes train each run together, got "
            f"{workers} with {accelerator.num_processes} such; leave it out."
        )
    sweep = Sweep(recipe.runs, output, accelerator)
    command = [__file__, *(sys.argv[1:] if arguments is None else arguments), "--workers", "0"]
    with helped_by(workers - 1 if recipe.searches or sweep.all_wanted() else 0, command):
        sweep.carry_out()
        search.carry_out(recipe.searches, sweep, output)
    if accelerator.is_main_process and workers:  # 0: a helper
        conclude(recipe, sweep.results, output, output / "plots" / f"{file.stem}.png")
    accelerator.end_training()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C, so that locks and helpers go
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Stopped: the same command does what is missing.")
