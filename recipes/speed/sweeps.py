"""Runs of one small network made one after the other, and together: the time of a training step of one run.

    python recipes/speed/sweeps.py [--rounds 5] [--runs 1 5 20 40] [--cases ...] [--threads 1] [--output <folder>]
    python recipes/speed/sweeps.py --report

Networks of recipes.tasks on random images; Adam trains theta_d. Five runs of dense differ in d, the next five in the
seed as well; runs of other projections differ in the seed alone. "alone": each run has its own P. "together": the runs
share P, and their networks are evaluated in turn or side by side (`torch.func.vmap`). Times are those of a step of R
runs and of the set-up, in which P is drawn, divided by R. "whole" is a recipe's run from its start to its result, by
`train` and by `train_together`.

The ways take turns, so that other work on the machine slows all of them alike; the load is kept beside the medians.
The gain is one of CPU time on a CPU and of wall time on a GPU.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.lab import command
from recipes.lab.measurement import at_least
from recipes.lab.results import read_measurement
from recipes.reports.tables import joined, markdown
from recipes.speed.record import FOLDER, measured, parser
from recipes.tasks.data import Split, load
from recipes.tasks.models import CLASSES, SHAPES, build
from recipes.training.optimizers import OPTIMIZERS, update
from recipes.training.settings import Settings
from recipes.training.together import Networks, train_together
from recipes.training.train import train, wrap


CASES = {  # largest d, batch
    ("fc", "digits", "dense"): (50, 128),
    ("fc", "digits", "fastjl"): (50, 128),
    ("lenet", "mnist", "dense"): (200, 128),
    ("lenet", "mnist", "fastjl"): (200, 128),
    ("conv2", "mnist", "dense"): (250, 128),
    ("conv2", "mnist", "fastjl"): (250, 128),
    ("fc", "mnist", "dense"): (300, 512),
    ("fc", "mnist", "fastjl"): (300, 512),
}
BY_NAME = {" ".join(case): case for case in CASES}
PROJECTIONS = ("dense", "fastjl", "fastfood", "sparse")
DS = 5  # values of d
WHOLE = 20  # whole runs, of 10 epochs of the digits


class Clock:
    """Wall and CPU milliseconds of several jobs, a pair for each time that a job is done."""

    def __init__(self, device: torch.device):
        self.device, self.times = device, {}

    def run(self, name: str, runs: int, job: Callable, *arguments: Any, **choices: Any) -> Any:
        """The job's value; its times are divided by the number of runs that it serves."""
        wall, cpu = time.perf_counter(), time.process_time()
        value = job(*arguments, **choices)
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        times = time.perf_counter() - wall, time.process_time() - cpu
        self.times.setdefault(name, []).append([1e3 * t / runs for t in times])
        return value

    def result(self) -> dict[str, dict[str, float]]:
        """Medians, and the median over rounds of how many times faster than "alone" a job is."""
        counts, results = int(self.device.type == "cpu"), {}
        for name, times in self.times.items():
            wall, cpu = (round(statistics.median(column), 3) for column in zip(*times, strict=True))
            pairs = zip(self.times["alone"], times, strict=True)
            gain = statistics.median(alone[counts] / job[counts] for alone, job in pairs)
            results[name] = {"wall_ms": wall, "cpu_ms": cpu, "gain": round(gain, 2)}
        return results


class Alone:
    """Runs made one after the other, each with its own P."""

    def __init__(self, runs: list[Settings], data: Split, accelerator: Accelerator):
        self.data, self.accelerator, self.prepared = data, accelerator, []
        for run in runs:
            model = wrap(build(run.model, run.dataset, run.seed), run)
            self.prepared.append(accelerator.prepare(model, OPTIMIZERS[run.optimizer](model, run)))

    def step(self, index: torch.Tensor) -> None:
        for (model, optimizer), chosen in zip(self.prepared, index, strict=False):
            update(model, optimizer, self.accelerator, *self.data.batch(chosen))


class Together:
    """Runs that share P."""

    def __init__(self, runs: list[Settings], data: Split, accelerator: Accelerator):
        self.data, self.networks = data, Networks(runs, data, accelerator.device)
        self.optimizer = OPTIMIZERS[runs[0].optimizer](nn.ParameterList([self.networks.theta_d]), runs[0])

    def step(self, index: torch.Tensor, side_by_side: bool) -> None:
        self.networks.side_by_side = side_by_side
        self.networks.backward(*self.data.batch(index))
        self.optimizer.step()


def settings(model: str, dataset: str, projection: str, d: int, R: int, **more: Any) -> list[Settings]:
    values = [d * (DS - k) // DS for k in range(DS)] if projection == "dense" else [d]
    return [
        Settings(
            dataset=dataset, model=model, projection=projection, projection_seed=0, d=values[r % len(values)],
            seed=r // len(values), **more,
        )
        for r in range(R)
    ]  # fmt: skip


def steps(case: tuple[str, str, str], R: int, rounds: int, accelerator: Accelerator) -> dict[str, Any]:
    """The times of a step and of the set-up, for R runs of one case."""
    model, dataset, projection = case
    d, batch = CASES[case]
    runs = settings(model, dataset, projection, d, R, lr=0.1)
    images = torch.randint(256, (4 * batch, *SHAPES[dataset]), dtype=torch.uint8)
    data = Split(images, torch.randint(CLASSES[dataset], (4 * batch,))).to(accelerator.device)
    setup, step, some = Clock(accelerator.device), Clock(accelerator.device), runs[:DS]
    alone = setup.run("alone", len(some), Alone, some, data, accelerator)
    together = setup.run("together", R, Together, runs, data, accelerator)
    for at in range(rounds + 1):
        if at == 1:
            step.times.clear()  # the first step draws and allocates
        index = torch.randint(len(images), (R, batch))
        step.run("alone", len(some), alone.step, index)
        step.run("in turn", R, together.step, index, side_by_side=False)
        step.run("side by side", R, together.step, index, side_by_side=True)
    return {"runs": R, "step": step.result(), "setup": setup.result()}


def whole(projection: str, R: int, rounds: int, accelerator: Accelerator) -> dict[str, dict[str, float]]:
    """The times of R whole runs of FC on the digits."""
    data = [load("digits", "", split).to(accelerator.device) for split in ("train", "test")]
    runs = settings("fc", "digits", projection, 50, R, lr=0.1, epochs=10)
    clock = Clock(accelerator.device)
    for _ in range(rounds):
        clock.run("alone", R, lambda: [train(run, accelerator, *data) for run in runs])
        clock.run("together", R, train_together, runs, accelerator, *data)
    return clock.result()


def parts(record: dict[str, Any]) -> dict[str, str]:
    """The table "steps", and "whole", sentences."""
    kind = "wall_ms" if record["device"] != "cpu" else "cpu_ms"
    counts = list(dict.fromkeys(result["runs"] for results in record["cases"].values() for result in results))
    rows = []
    for name, results in record["cases"].items():
        model, dataset, projection = name.split()
        gains = {r["runs"]: " / ".join(f"{way['gain']:.1f}" for way in list(r["step"].values())[1:]) for r in results}
        last = results[-1]
        setup = f"{last['setup']['alone'][kind]:.0f} to {last['setup']['together'][kind]:.0f}"
        alone = f"{results[0]['step']['alone'][kind]:.1f}"
        rows.append([f"{model}, {dataset}", projection, alone, *(gains.get(R, "") for R in counts), setup])
    header = ["network", "projection", "alone, ms a step", *(f"together: {R}" for R in counts)]
    lines = []
    for projection, result in record["whole"].items():
        alone, together = (result[way] for way in ("alone", "together"))
        lines.append(
            f"{WHOLE} whole runs of fc on digits, {projection}: {alone[kind]:.0f} ms a run alone, "
            f"{together[kind]:.0f} ms together, {together['gain']:.1f} times faster."
        )
    return {"steps": "\n".join(markdown([*header, f"set-up, {counts[-1]} runs, ms"], rows)), "whole": "\n".join(lines)}


def text(record: dict[str, Any]) -> str:
    return joined(parts(record))


def tables() -> dict[str, str]:
    """What the committed results say, for the README."""
    return parts(read_measurement(FOLDER / "sweeps.jsonl"))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    cases = {name: [] for name in options.cases}
    gc.disable()  # a collection would slow the runs that step when it comes
    for name, R in tqdm([(name, R) for name in options.cases for R in options.runs], unit="case"):
        cases[name].append(steps(BY_NAME[name], R, options.rounds, accelerator))
        accelerator.free_memory()
        gc.collect()
    wholes = {projection: whole(projection, WHOLE, 3, accelerator) for projection in options.whole}
    gc.enable()
    return {
        "device": accelerator.device.type,
        "d and batch": {name: CASES[BY_NAME[name]] for name in options.cases},
        "rounds": options.rounds,
        "cases": cases,
        "whole": wholes,
    }


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__, threads=1)
    options.add_argument("--rounds", type=at_least(1), default=5)
    options.add_argument("--runs", type=at_least(1), nargs="+", default=[1, 5, 20, 40])
    options.add_argument("--cases", nargs="+", choices=BY_NAME, default=list(BY_NAME))
    options.add_argument(
        "--whole", nargs="*", choices=PROJECTIONS, default=["dense", "fastjl"], help="projections of the whole runs"
    )
    chosen = options.parse_args(arguments)
    print(text(measured("sweeps", chosen, lambda: measure(chosen))))


if __name__ == "__main__":
    command.run(main)
