"""Time of a training step and peak memory of every method in a YAML.

    python recipes/vit_lora/cost.py recipes/vit_lora/mnist.yaml [--steps 20] [--rounds 3] [--output <folder>]
    python recipes/vit_lora/cost.py recipes/vit_lora/mnist.yaml --report

The same training as in a run, on random images of the data set's shape. Memory is the most that torch holds at once
from before the model is built to the end of two steps: weights, what is kept of P, gradients, moments of AdamW,
activations, temporaries. Times are the smallest of the rounds, in which the methods take turns, so that other work on
the machine slows all of them alike. Settings on the command line narrow the grid as in recipes/run.py; `--base ""`
with a shape measures a ViT of that size with random weights.
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.lab import command
from recipes.lab.measurement import Parser, at_least, measured, runs_of, with_load
from recipes.lab.results import read_measurement
from recipes.reports.tables import markdown
from recipes.tasks.data import Split
from recipes.tasks.models import CLASSES, SHAPES
from recipes.training.memory import peak
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
        memory = peak(partial(train, run, *2 * (images(run),), output, shorter=2))
        rows.append(row | {"step_ms": times, "setup_s": setup, "peak_mb": memory / 1e6})
    return rows


def text(rows: list[dict]) -> str:
    cells = [
        [row["method"], f"{row['trained']:,}", f"{row['step_ms']['wall']:.0f}", f"{row['step_ms']['cpu']:.0f}"]
        + [f"{row['setup_s']:.1f}", f"{row['peak_mb']:.1f}"]
        for row in rows
    ]
    return "\n".join(markdown(["method", "trained", "ms a step", "CPU ms", "s to set up", "peak MB"], cells))


def tables() -> dict[str, str]:
    """What the committed results say, by the YAML's name, for the README."""
    files = sorted(Path(__file__).parent.glob("costs_*.jsonl"))
    return {file.stem.removeprefix("costs_"): text(read_measurement(file)["runs"]) for file in files}


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("file", type=Path, help="the YAML")
    parser.add_argument("--steps", type=at_least(1), default=20)
    parser.add_argument("--rounds", type=at_least(1), default=3)
    options, rest = parser.parse_known_args(arguments)
    file, output, steps, rounds = options.file, options.output or options.file.parent, options.steps, options.rounds
    all_runs = runs_of(file, "vit_lora", command.settings(rest, KEYS))
    runs = list({replace(run, seed=0, data="", checkpoint=""): None for run in all_runs})
    settings = {"steps": steps, "rounds": rounds}
    record = measured(
        output / f"costs_{file.stem}.jsonl",
        options.report,
        lambda: settings | with_load(lambda: {"runs": costs(runs, output, steps, rounds)}),
    )
    print(text(record["runs"]))


if __name__ == "__main__":
    command.run(main)
