"""What training changes in the weights of nonlinear networks: singular values, singular subspaces, the increment.

    python recipes/run.py recipes/spectra/mlp.yaml [--data <folder>] [--output <folder>]

Of each watched weight W(t), at steps that rise geometrically: its singular values; how far the blocks of the first K
and the last K singular vectors and of those between turn (K classes; `subspace_peft.spectra`); and of the increment
W(t) - W(0) how much of its square lies in its first K, 2K directions, and inside those of an earlier increment.
"""

import time
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from recipes.lab.kinds import measured
from recipes.lab.settings import PlainSettings
from recipes.spectra.dynamics import dynamics, truncated, watched
from recipes.spectra.networks import accuracy, logits, network
from recipes.tasks.data import batches, load


def measure(settings: PlainSettings) -> dict[str, Any]:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    training, test = (
        load(settings["dataset"], settings.get("_data", ""), part).to(device) for part in ("train", "test")
    )
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


KIND = measured("spectra", measure, options=("data",), report="spectra.report")
