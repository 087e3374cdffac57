"""One run: build, wrap, train, measure. A plain accelerate loop over tensors that lie on the device."""

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import evaluate
import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from recipes.data import Split, batches
from recipes.models import build
from recipes.settings import OPTIMIZERS, SCHEDULES, Settings
from subspace_peft import SubspaceConfig


ACCURACY = Path(__file__).parent / "metrics" / "accuracy"


def train(
    settings: Settings,
    accelerator: Accelerator,
    training: Split,
    test: Split,
    adapter: Path | None = None,
    report: Callable[[float], None] = lambda accuracy: None,
) -> dict[str, Any]:
    """The result of a run. `adapter` is the folder to save it in, `report` gets each epoch's test accuracy."""
    start = time.perf_counter()
    model, D = wrap(settings)
    optimizer, schedule = _optimizer(model, settings, settings.epochs * (len(training.labels) // settings.batch_size))
    model, optimizer = accelerator.prepare(model, optimizer)
    seconds = {"setup": time.perf_counter() - start, "train": 0.0}

    order, epochs = torch.Generator().manual_seed(settings.seed), []
    for _ in range(settings.epochs):
        start = time.perf_counter()
        indices = batches(len(training.labels), settings.batch_size, order)
        loss = _epoch(model, optimizer, schedule, accelerator, training, indices)
        seconds["train"] += time.perf_counter() - start
        accuracy = (predict(model, test).argmax(1) == test.labels).double().mean().item()
        epochs.append({"train_loss": loss if math.isfinite(loss) else None, "test_accuracy": accuracy})
        report(accuracy)

    model = accelerator.unwrap_model(model)
    result = {
        "D": D,
        "d": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "final_accuracy": evaluated_accuracy(model, test),
        "best_accuracy": max(epoch["test_accuracy"] for epoch in epochs),
        "epochs": epochs,
        "seconds": {key: round(value, 3) for key, value in seconds.items()},
        "processes": accelerator.num_processes,
    }
    if adapter is not None and accelerator.is_main_process:
        result["adapter"] = save_and_reload(model, settings, test, adapter)
    return result


def wrap(settings: Settings) -> tuple[nn.Module, int]:
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


def _optimizer(model: nn.Module, settings: Settings, steps: int) -> tuple[Optimizer, LambdaLR]:
    momentum = {"momentum": settings.momentum} if settings.optimizer == "sgd" else {}
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = OPTIMIZERS[settings.optimizer](trainable, lr=settings.lr, **momentum)
    factor = SCHEDULES[settings.schedule]
    return optimizer, LambdaLR(optimizer, lambda step: factor(step / steps))


def _epoch(
    model: nn.Module,
    optimizer: Optimizer,
    schedule: LambdaLR,
    accelerator: Accelerator,
    training: Split,
    indices: Iterable[Tensor],
) -> float:
    """The mean loss of one epoch. Each process takes its share of the same global batch; gradients are averaged."""
    model.train()
    losses = []
    for index in indices:
        images, labels = training.batch(index[accelerator.process_index :: accelerator.num_processes])
        loss = cross_entropy(model(images), labels)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.detach())
    return accelerator.reduce(torch.stack(losses).mean(), "mean").item()
