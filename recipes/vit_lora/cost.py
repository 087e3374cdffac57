"""Time of a training step and peak memory of every method in a YAML.

    python recipes/vit_lora/cost.py recipes/vit_lora/mnist.yaml [--steps 20] [--rounds 3] [--output <folder>]

On random images of the data set's shape, by the Trainer that trains. Memory is the most that torch holds at once from
before the model is built to the end of two steps: weights, what P is drawn to, gradients, moments of AdamW,
activations, temporaries. Times are the smallest of the rounds, in which each method has its turn, so that whatever
else the machine does falls on all alike. Settings are overridden as in finetune.py; `--base ""` with a shape measures
a ViT of that size with random weights.
"""

import gc
import itertools
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.lab import command, environment
from recipes.lab.grid import read
from recipes.tasks.data import Split
from recipes.tasks.models import CLASSES, SHAPES
from recipes.vit_lora.settings import KEYS, Settings
from recipes.vit_lora.training import train


BATCHES = 4


def images(settings: Settings) -> Split:
    n, classes = BATCHES * settings.batch_size, CLASSES[settings.dataset]
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (n, *SHAPES[settings.dataset]), generator=random, dtype=torch.uint8)
    labels = torch.arange(n) % classes
    labels[-1] = classes - 1
    return Split(pixels, labels).to("cuda" if torch.cuda.is_available() else "cpu")


def peak(settings: Settings, split: Split, output: Path) -> int:
    """Bytes of torch's own allocations."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train(settings, split, split, output, shorter=2)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train(settings, split, split, output, shorter=2)
    events = (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes))


def costs(runs: list[Settings], output: Path, steps: int, rounds: int) -> list[dict]:
    """One row for each run."""
    timed = {run: [] for run in runs}
    for run in tqdm(rounds * runs, desc="times"):
        timed[run].append(train(run, *2 * (images(run),), output, shorter=steps)[0])
    rows = []
    for run, results in tqdm(timed.items(), desc="memory"):
        times = {key: min(result["step_ms"][key] for result in results) for key in ("wall", "cpu")}
        setup = min(result["seconds"]["setup"] for result in results)
        row = {
            "name": run.name,
            "method": str(run),
            "settings": run.record(),
            "trained": sum(results[0]["trainable"].values()),
        }
        rows.append(row | {"step_ms": times, "setup_s": setup, "peak_mb": peak(run, images(run), output) / 1e6})
    return rows


def text(rows: list[dict]) -> str:
    lines = ["| method | trained | ms a step | CPU ms | s to set up | peak MB |", "|" + " --- |" * 6]
    for row in rows:
        times = f"{row['step_ms']['wall']:.0f} | {row['step_ms']['cpu']:.0f} | {row['setup_s']:.1f}"
        lines.append(f"| {row['method']} | {row['trained']:,} | {times} | {row['peak_mb']:.1f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = command.Parser(__doc__)
    parser.add_argument("file", type=Path, help="the YAML")
    parser.add_argument("--output", type=Path, help="where the results go; the YAML's folder")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    options, rest = parser.parse_known_args(arguments)
    file, output, steps, rounds = options.file, options.output or options.file.parent, options.steps, options.rounds
    overrides = command.settings(rest, KEYS)
    runs = list({replace(run, seed=0, data="", checkpoint=""): None for run in read(file, overrides).runs})
    before = os.getloadavg()
    rows = costs(runs, output, steps, rounds)
    record = {"steps": steps, "rounds": rounds, "load": {"before": before, "after": os.getloadavg()}}
    target = output / "results" / f"costs_{file.stem}.json"
    environment.write(target, record | {"runs": rows})
    print(f"{text(rows)}\n\nload before {before[0]:.1f}, after {os.getloadavg()[0]:.1f}; {target}")


if __name__ == "__main__":
    command.run(main)
