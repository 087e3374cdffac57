"""Time of a training step and peak memory of every method in a YAML, each in a process of its own.

    python recipes/vit_lora/cost.py recipes/vit_lora/mnist.yaml [--steps 20] [--rounds 3] [--output <folder>]

On random images of the data set's shape, by the Trainer that trains. The methods are gone through several times, one
after the other, so that whatever else the machine does falls on all alike; what counts is the fastest round. Memory is
what the process takes at its peak beyond what it took before the model was built; on a GPU, what torch allocated.
Settings are overridden as in finetune.py. `--base ""` with a shape measures a ViT of that size with random weights.
"""

import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes import environment
from recipes.data import Split
from recipes.models import CLASSES, SHAPES
from recipes.vit_lora.finetune import parser
from recipes.vit_lora.settings import Settings, read
from recipes.vit_lora.training import train


BATCHES = 4


def images(settings: Settings) -> Split:
    n, classes = BATCHES * settings.batch_size, CLASSES[settings.dataset]
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (n, *SHAPES[settings.dataset]), generator=random, dtype=torch.uint8)
    split = Split(pixels, torch.arange(n) % classes if n >= classes else torch.full((n,), classes - 1))
    return split.to("cuda" if torch.cuda.is_available() else "cpu")


def resident(at_peak: bool) -> int:
    """Bytes of memory of this process."""
    status = Path("/proc/self/status")
    if not status.exists():  # elsewhere the peak is all that is known
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    field = "VmHWM:" if at_peak else "VmRSS:"
    return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field))


def measure(settings: Settings, output: Path, steps: int) -> dict[str, float]:
    """In this process, which has done nothing before."""
    split = images(settings)
    before = resident(at_peak=False)
    result, _ = train(settings, split, split, output, shorter=steps)
    gpu = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if gpu else resident(at_peak=True) - before
    return {"step_ms": result["step_ms"], "setup": result["seconds"]["setup"], "peak": peak} | result["trainable"]


def measured_apart(settings: Settings, output: Path, steps: int) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", __file__, "--one", json.dumps(settings.record()), str(output)]
    done = subprocess.run([*command, str(steps)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{settings}: the measurement ended with\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def costs(runs: list[Settings], output: Path, steps: int, rounds: int) -> list[dict]:
    """One row for each run; the wall time of a step is the smallest of the rounds, and so is CPU time."""
    found = {run: [] for run in runs}
    for run in tqdm(rounds * list(found), unit="process"):
        found[run].append(measured_apart(run, output, steps))
    return [
        {
            "name": run.name,
            "method": str(run),
            "trained": rounds[0]["adapter"] + rounds[0]["head"],
            "step_ms": min(r["step_ms"]["wall"] for r in rounds),
            "step_cpu_ms": min(r["step_ms"]["cpu"] for r in rounds),
            "setup_s": min(r["setup"] for r in rounds),
            "peak_mb": min(r["peak"] for r in rounds) / 1e6,
        }
        for run, rounds in found.items()
    ]


def text(rows: list[dict]) -> str:
    lines = ["| method | trained | ms a step | CPU ms | s to set up | peak MB |", "|" + " --- |" * 6]
    for row in rows:
        times = f"{row['step_ms']:.0f} | {row['step_cpu_ms']:.0f} | {row['setup_s']:.1f}"
        lines.append(f"| {row['method']} | {row['trained']:,} | {times} | {row['peak_mb']:.0f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--rounds", type=int, default=3)
    overrides = vars(options.parse_args(arguments))
    file, output, steps, rounds = (overrides.pop(key) for key in ("file", "output", "steps", "rounds"))
    output = output or file.parent
    runs = {replace(run, seed=0, data="", checkpoint=""): None for run in read(file, overrides).runs}
    before = os.getloadavg()
    rows = costs(list(runs), output, steps, rounds)
    record = {"steps": steps, "rounds": rounds, "load": {"before": before, "after": os.getloadavg()}}
    target = output / "results" / f"costs_{file.stem}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(record | {"runs": rows} | environment.record(), indent=1) + "\n")
    print(f"{text(rows)}\n\nload before {before[0]:.1f}, after {os.getloadavg()[0]:.1f}; {target}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        record, folder, steps = sys.argv[2:]
        print(json.dumps(measure(Settings(**json.loads(record)), Path(folder), int(steps))))
    else:
        main()
