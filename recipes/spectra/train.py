"""What training changes in the weights of nonlinear networks: singular values, singular subspaces, the increment.

    python recipes/spectra/train.py recipes/spectra/mlp.yaml [--data <folder>] [--output <folder>]
    python recipes/spectra/train.py recipes/spectra/mlp.yaml --plot

Of each watched weight W(t), at steps that rise geometrically: its singular values; how far the blocks of the first K
and the last K singular vectors and of those between turn (K classes; `subspace_peft.spectra`); and of the increment
W(t) - W(0) how much of its square lies in its first K, 2K directions, and inside those of an earlier increment.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.lab.collected import Collected, Settings, conclude, spanned
from recipes.spectra.dynamics import dynamics, truncated, watched
from recipes.spectra.networks import accuracy, logits, network
from recipes.spectra.report import label, plot, text
from recipes.tasks.data import batches, load


DEFAULTS = {"activation": "relu", "start": "default", "image_size": 0, "images": 0, "bf16": False}


def measure(settings: Settings, data: str) -> dict[str, Any]:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    training, test = (load(settings["dataset"], data, part).to(device) for part in ("train", "test"))
    training = training.first(settings["images"] or len(training.labels))
    classes = 1 + int(training.labels.max())
    model = network(settings, tuple(training.images.shape[1:]), classes).to(device)
    make = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[settings["optimizer"]]
    optimizer = make(model.parameters(), lr=settings["lr"])
    generator, size = torch.Generator().manual_seed(settings["seed"]), settings["batch_size"]
    total = settings["epochs"] * (len(training.labels) // size)
    wanted = {0, total, *np.geomspace(1, total, settings["recorded"]).round().astype(int).tolist()}
    seen, losses, started = {0: watched(model, settings)}, [], time.process_time()
    order = (index for _ in range(settings["epochs"]) for index in batches(len(training.labels), size, generator))
    for step, index in enumerate(order, 1):
        z, y = logits(model, training, index.to(device), settings)
        loss = cross_entropy(z, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in wanted:
            seen[step] = watched(model, settings)
            losses.append(round(loss.item(), 4))
            print(f"step {step} of {total}: loss {loss.item():.3f}", flush=True)
    trained = time.process_time()
    reached = accuracy(model, test, settings)
    layers = dynamics(seen, classes, reference=int(settings["start"] == "orthogonal"))
    for name, layer in layers.items():
        layer["accuracy"] = truncated(model, name, seen[0][name], layer["directions"], test, settings)
    seconds = {"train": round(trained - started), "decompose": round(time.process_time() - trained)}
    result = {"classes": classes, "steps": sorted(seen), "loss": losses, "accuracy": reached, "cpu_seconds": seconds}
    return result | {"layers": layers}


def main(arguments: list[str] | None = None) -> None:
    """Make the runs that are missing, each kept when it ends; print the table, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=Path)
    parser.add_argument("--data", default="", help="a folder with train.parquet and test.parquet, or another Hub id")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--plot", action="store_true", help="table and figure of what is there, no runs")
    options = parser.parse_args(arguments)
    runs = spanned(options.settings, defaults=DEFAULTS)
    results = Collected(options.output / "results" / f"{options.settings.stem}.json")
    if not options.plot:
        results.carry_out(runs, lambda settings: measure(settings, options.data), label)
    conclude(results, runs, text, plot, options.output / "plots" / f"{options.settings.stem}.png")


if __name__ == "__main__":
    main()
