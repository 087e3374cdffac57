"""Runs of one small network alone, one after the other, and together: a training step of each way in turn.

    python recipes/speed/sweeps.py [--rounds 5] [--runs 1 5 20 40] [--cases ...] [--threads 1] [--output <file>]

Networks of recipes.tasks on random images; theta_d by Adam. The runs of dense have five d and as many seeds as there
are fives of runs, those of other projections have seeds alone. "together" shares P, its networks in turn or side by
side (`torch.func.vmap`). Times are for one run: a step of R runs, divided by R, and the set-up, in which P is drawn.
"whole" is a recipe run from its start to its result, by `train` and by `train_together`.

Interleaved, so that whatever else the machine does falls on all alike; the load is written beside the medians. On a
CPU what counts is CPU time, on a GPU the clock.
"""

import argparse
import gc
import os
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

from recipes.speed.record import keep
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
DS = 5  # values of d
WHOLE = 20  # runs, of 10 epochs of the digits
RESULTS = Path(__file__).parent / "results"


class Clock:
    """What each of several jobs takes: wall and CPU milliseconds, a pair each time."""

    def __init__(self, device: torch.device):
        self.device, self.times = device, {}

    def run(self, name: str, runs: int, job: Callable, *arguments: Any, **choices: Any) -> Any:
        """Does a job that serves so many runs; counts it for one."""
        wall, cpu = time.perf_counter(), time.process_time()
        value = job(*arguments, **choices)
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        times = time.perf_counter() - wall, time.process_time() - cpu
        self.times.setdefault(name, []).append([1e3 * t / runs for t in times])
        return value

    def result(self) -> dict[str, dict[str, float]]:
        """Medians, and how many times faster than "alone", round by round."""
        counts, results = int(self.device.type == "cpu"), {}
        for name, times in self.times.items():
            wall, cpu = (round(statistics.median(column), 3) for column in zip(*times, strict=True))
            pairs = zip(self.times["alone"], times, strict=True)
            gain = statistics.median(alone[counts] / own[counts] for alone, own in pairs)
            results[name] = {"wall_ms": wall, "cpu_ms": cpu, "gain": round(gain, 2)}
        return results


class Alone:
    """Some of the runs, each with a P of its own."""

    def __init__(self, runs: list[Settings], data: Split, accelerator: Accelerator):
        self.data, self.accelerator, self.prepared = data, accelerator, []
        for run in runs:
            model = wrap(build(run.model, run.dataset, run.seed), run)
            self.prepared.append(accelerator.prepare(model, OPTIMIZERS[run.optimizer](model, run)))

    def step(self, index: torch.Tensor) -> None:
        for (model, optimizer), own in zip(self.prepared, index, strict=False):
            update(model, optimizer, self.accelerator, *self.data.batch(own))


class Together:
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
    """One case with R runs: a step, and the set-up."""
    model, dataset, projection = case
    d, batch = CASES[case]
    runs = settings(model, dataset, projection, d, R)
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
    """R whole runs of FC on the digits."""
    data = [load("digits", "", split).to(accelerator.device) for split in ("train", "test")]
    runs = settings("fc", "digits", projection, 50, R, lr=0.1, epochs=10)
    clock = Clock(accelerator.device)
    for _ in range(rounds):
        clock.run("alone", R, lambda: [train(run, accelerator, *data) for run in runs])
        clock.run("together", R, train_together, runs, accelerator, *data)
    return clock.result()


def text(record: dict[str, Any]) -> str:
    kind = "wall_ms" if record["device"] != "cpu" else "cpu_ms"
    header = ["network", "projection", "runs", "alone, ms", "in turn, ms", "side by side, ms", "gain", "set-up, gain"]
    lines = ["| " + " | ".join(header) + " |", "| --- " * len(header) + "|"]
    for name, results in record["cases"].items():
        model, dataset, projection = name.split()
        for result in results:
            ways = list(result["step"].values())
            cells = [f"{model}, {dataset}", projection, result["runs"], *(f"{way[kind]:.2f}" for way in ways)]
            cells += [
                " / ".join(f"{way['gain']:.1f}" for way in ways[1:]),
                f"{result['setup']['together']['gain']:.1f}",
            ]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    for projection, result in record["whole"].items():
        alone, together = (result[way] for way in ("alone", "together"))
        lines.append(
            f"{WHOLE} whole runs of fc on digits, {projection}: {alone[kind]:.0f} ms a run alone, "
            f"{together[kind]:.0f} ms together, {together['gain']:.1f} times faster"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    names = {" ".join(case): case for case in CASES}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 5, 20, 40])
    parser.add_argument("--cases", nargs="+", choices=names, default=list(names))
    parser.add_argument("--whole", nargs="*", default=["dense", "fastjl"], help="projections of the whole runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS / "sweeps.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    before, cases = os.getloadavg(), {name: [] for name in options.cases}
    gc.disable()  # a collection would fall on whoever steps when it comes
    for name, R in tqdm([(name, R) for name in options.cases for R in options.runs], unit="case"):
        cases[name].append(steps(names[name], R, options.rounds, accelerator))
        accelerator.free_memory()
        gc.collect()
    wholes = {projection: whole(projection, WHOLE, 3, accelerator) for projection in options.whole}
    gc.enable()
    record = {
        "device": accelerator.device.type,
        "d and batch": {name: CASES[names[name]] for name in options.cases},
        "rounds": options.rounds,
        "cases": cases,
        "whole": wholes,
    }
    keep(options.output, record, before, text(record))


if __name__ == "__main__":
    main()
