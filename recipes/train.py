"""One run: build, wrap, train, measure. A plain accelerate loop over tensors that lie on the device."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import evaluate
import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from recipes.data import Split, batches
from recipes.models import build
from recipes.optimizers import OPTIMIZERS, scheduled, update
from recipes.settings import Settings
from subspace_peft import SubspaceConfig, Trajectory


ACCURACY = Path(__file__).parent / "metrics" / "accuracy"


def train(
    settings: Settings,
    accelerator: Accelerator,
    training: Split,
    test: Split,
    adapter: Path | None = None,
    trajectory: Path | None = None,
    report: Callable[[float], None] = lambda accuracy: None,
) -> dict[str, Any]:
    """The result of a run.

    Args:
        adapter: The folder to save it in.
        trajectory: The folder of samples: full training writes one after each epoch, a basis is made of them.
        report: Gets each epoch's test accuracy.
    """
    start = time.perf_counter()
    if settings.images:
        training = training.first(settings.images)
    if settings.standardize:
        training, test = training.standardized(training), test.standardized(training)
    model, D = wrap(settings, trajectory)
    optimizer = OPTIMIZERS[settings.optimizer](model, settings)
    steps = settings.epochs * (len(training.labels) // settings.batch_size)
    schedule = scheduled(optimizer, settings, steps)
    model, optimizer = accelerator.prepare(model, optimizer)
    seconds = {"setup": time.perf_counter() - start, "train": 0.0}

    recorder = Trajectory(trajectory) if trajectory and settings.projection == "full" else None
    if recorder is not None:
        recorder.add(model, step=0)
    random, epochs = torch.Generator().manual_seed(settings.seed), []
    for epoch in range(1, settings.epochs + 1):
        start = time.perf_counter()
        loss = _epoch(model, optimizer, schedule, accelerator, training, settings, random)
        seconds["train"] += time.perf_counter() - start
        if recorder is not None:
            recorder.add(model, step=epoch)
        accuracy = (predict(model, test).argmax(1) == test.labels).double().mean().item()
        epochs.append(
            {
                "train_loss": loss if math.isfinite(loss) else None,
                "test_accuracy": accuracy,
                "seconds": round(seconds["train"], 3),
            }
        )
        report(accuracy)

    model = accelerator.unwrap_model(model)
    result = {
        "D": D,
        "d": settings.d if settings.d else sum(p.numel() for p in model.parameters() if p.requires_grad),
        "final_accuracy": evaluated_accuracy(model, test),
        "best_accuracy": max(epoch["test_accuracy"] for epoch in epochs),
        "epochs": epochs,
        "seconds": {key: round(value, 3) for key, value in seconds.items()},
        "processes": accelerator.num_processes,
    }
    if adapter is not None and accelerator.is_main_process:
        result["adapter"] = save_and_reload(model, settings, test, adapter)
    return result


def wrap(settings: Settings, trajectory: Path | None = None) -> tuple[nn.Module, int]:
    """The network in its subspace, theta = theta_0 + P theta_d over all D parameters, and D; "full" wraps nothing."""
    network = build(settings.model, settings.dataset, settings.seed)
    D = sum(p.numel() for p in network.parameters())
    if settings.projection == "full":
        return network, D
    config = SubspaceConfig(
        d=settings.d or None,
        projection=settings.projection,
        normalization=settings.normalization,
        nnz_per_row=settings.nnz_per_row or None,
        basis=Trajectory(trajectory, last=settings.samples).basis(settings.d) if settings.samples else None,
        seed=settings.seed,
        target_modules="all",
    )
    return get_peft_model(network, config), D


def predict(model: nn.Module, split: Split) -> Tensor:  # [N, classes]
    model.eval()
    with torch.no_grad():
        return torch.cat([model(split.batch(index)[0]) for index in torch.arange(len(split.labels)).split(1000)])


def evaluated_accuracy(model: nn.Module, split: Split) -> float:
    metric = evaluate.load(str(ACCURACY), keep_in_memory=True)
    return metric.compute(predictions=predict(model, split).argmax(1).cpu(), references=split.labels.cpu())["accuracy"]


def save_and_reload(model: nn.Module, settings: Settings, split: Split, folder: Path) -> dict[str, Any]:
    """Saves the adapter, and what a newly built network gives with the adapter loaded from there: the same outputs."""
    model.save_pretrained(folder)
    network = build(settings.model, settings.dataset, settings.seed).to(split.images.device)
    reloaded = PeftModel.from_pretrained(network, folder)
    difference = (predict(model, split) - predict(reloaded, split)).abs().max().item()
    return {"bytes": (folder / "adapter_model.safetensors").stat().st_size, "max_difference": difference}


def _epoch(
    model: nn.Module,
    optimizer: Optimizer,
    schedule: LambdaLR,
    accelerator: Accelerator,
    training: Split,
    settings: Settings,
    random: torch.Generator,
) -> float:
    """The mean loss of one epoch. Each process takes its share of the same global batch; gradients are averaged."""
    model.train()
    losses = []
    for index in batches(len(training.labels), settings.batch_size, random):
        images, labels = training.batch(index, random if settings.augment else None)
        share = slice(accelerator.process_index, None, accelerator.num_processes)
        losses.append(update(model, optimizer, accelerator, images[share], labels[share]))
        schedule.step()
    return accelerator.reduce(torch.stack(losses).mean(), "mean").item()
