"""One run: build, wrap, train, measure. A plain accelerate loop over tensors that lie on the device."""

import itertools
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
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from recipes.tasks.data import Split, batches, check_batch_size
from recipes.tasks.models import build
from recipes.training.optimizers import OPTIMIZERS, scheduled, update
from recipes.training.settings import Settings
from recipes.training.tickets import Mask, lottery_ticket, prune, random_ticket
from subspace_peft import SubspaceConfig, Trajectory


ACCURACY = Path(__file__).parents[1] / "metrics" / "accuracy"


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
        trajectory: The folder of samples: full training writes them, a basis or a lottery ticket is made of them.
        report: Gets each epoch's test accuracy.
    """
    start = time.perf_counter()
    training, test = inputs(settings, training, test)
    network = origin(settings, training, trajectory, accelerator.device)
    D = sum(p.numel() for p in network.parameters())
    model = wrap(network, settings, trajectory)
    optimizer = OPTIMIZERS[settings.optimizer](model, settings)
    steps = settings.epochs * (len(training.labels) // settings.batch_size)
    schedule = scheduled(optimizer, settings, steps)
    model, optimizer = accelerator.prepare(model, optimizer)
    seconds = {"setup": time.perf_counter() - start, "train": 0.0}
    shown = measured_on(settings, training, test)
    at_origin = {"origin": measured(shown, [predict(model, s) for s in shown])} if settings.measured else {}

    recorder = Trajectory(trajectory) if trajectory and settings.projection == "full" else None
    if recorder is not None:
        recorder.add(model, step=0)
    random, epochs = torch.Generator().manual_seed(settings.seed), []
    for epoch in range(1, settings.epochs + 1):
        start = time.perf_counter()
        loss = _epoch(model, optimizer, schedule, accelerator, training, settings, random, recorder)
        seconds["train"] += time.perf_counter() - start
        if recorder is not None and not settings.sample_steps:
            recorder.add(model, step=epoch)
        values = {"train_loss": finite(loss)} | measured(shown, [predict(model, split) for split in shown])
        epochs.append(values | {"seconds": round(seconds["train"], 3)})
        report(values["test_accuracy"])

    model = accelerator.unwrap_model(model)
    d = settings.d if settings.d else sum(p.numel() for p in model.parameters() if p.requires_grad)
    final = evaluated_accuracy(predict(model, test), test)
    result = outcome(D, d, final, at_origin, epochs, seconds, accelerator.num_processes)
    if adapter is not None and accelerator.is_main_process:
        anew = origin(settings, training, trajectory, accelerator.device)
        result["adapter"] = save_and_reload(model, anew, test, adapter)
    return result


def inputs(settings: Settings, training: Split, test: Split) -> tuple[Split, Split]:
    """The two splits as the network sees them.

    Raises:
        ValueError: if there are fewer training images than a batch has.
    """
    if settings.images:
        training = training.first(settings.images)
    check_batch_size(len(training.labels), settings.batch_size)
    if settings.standardize:
        training, test = training.standardized(training), test.standardized(training)
    if settings.center:
        training, test = training.centered(training), test.centered(training)
    return training, test


def outcome(
    D: int,
    d: int,
    final_accuracy: float,
    at_origin: dict[str, dict[str, float | None]],
    epochs: list[dict[str, float | None]],
    seconds: dict[str, float],
    processes: int,
) -> dict[str, Any]:
    """The result of a run, in its layout."""
    return {
        "D": D,
        "d": d,
        "final_accuracy": final_accuracy,
        "best_accuracy": max(epoch["test_accuracy"] for epoch in epochs),
        **at_origin,
        "epochs": epochs,
        "seconds": {key: round(value, 3) for key, value in seconds.items()},
        "processes": processes,
    }


def origin(settings: Settings, training: Split, trajectory: Path | None, device: torch.device | str) -> nn.Module:
    """The network at theta_d = 0: built from the seed, then burnt in, then pruned."""
    network = build(settings.model, settings.dataset, settings.seed)
    if settings.burn_in:
        burn_in(network.to(device), settings, training)
    if settings.pruned:
        prune(network, mask(network, settings, trajectory))
    return network


def burn_in(network: nn.Module, settings: Settings, training: Split) -> None:
    """t steps of SGD with momentum 0.9 in full space (Larsen et al. 2021, eq. 2.2), with t = `settings.burn_in`.

    Where a trajectory was trained so, from the same seed and in such batches, this is its point t: a rewinding.
    """
    optimizer = torch.optim.SGD(network.parameters(), lr=settings.burn_in_lr, momentum=0.9)
    random, n = torch.Generator().manual_seed(settings.seed), len(training.labels)
    network.train()
    epochs = (batches(n, settings.batch_size, random) for _ in itertools.count())
    for index in itertools.islice(itertools.chain.from_iterable(epochs), settings.burn_in):
        images, labels = training.batch(index, random if settings.augment else None)
        optimizer.zero_grad()
        cross_entropy(network(images), labels).backward()
        optimizer.step()


def mask(network: nn.Module, settings: Settings, trajectory: Path | None) -> Mask:
    """The mask of projection "coordinate": the lottery ticket at the end of the trajectory, or a random one."""
    if settings.trajectory:
        sample = Trajectory(trajectory).sample(-1)
        return lottery_ticket({name: sample[name] for name, _ in network.named_parameters()}, settings.d)
    return random_ticket(network, settings.d, settings.seed)


def wrap(network: nn.Module, settings: Settings, trajectory: Path | None = None) -> nn.Module:
    """The network in its subspace, theta = theta_0 + P theta_d over all D parameters; "full" wraps nothing."""
    if settings.projection == "full":
        return network
    given = {}
    if settings.projection == "basis":
        samples = Trajectory(trajectory, increments=settings.increments, last=settings.samples)
        given["basis"] = samples.basis(settings.d, center=not settings.increments)
    if settings.projection == "coordinate" and (settings.pruned or settings.trajectory):
        given["mask"] = mask(network, settings, trajectory)
    config = SubspaceConfig(
        d=settings.d or None,
        projection=settings.projection,
        normalization=settings.normalization,
        nnz_per_row=settings.nnz_per_row or None,
        seed=settings.seed if settings.projection_seed < 0 else settings.projection_seed,
        **(factored(network, settings) if settings.rank else {"target_modules": "all"}),
        **given,
    )
    return get_peft_model(network, config)


def factored(network: nn.Module, settings: Settings) -> dict[str, Any]:
    """The config of low-rank training: linear layers but the first and the last as W = B A, other modules whole.

    Raises:
        ValueError: if the network has no linear layer between two others.
    """
    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    hidden = layers[1:-1]
    if not hidden:
        raise ValueError(
            f"`rank` needs a linear layer between the first and the last, {settings.model!r} has {len(layers)}; "
            "take another `model`, such as 'mlp' or 'fc'."
        )
    owners = {name.rpartition(".")[0] for name, _ in network.named_parameters()}
    return {
        "coordinates": "low_rank",
        "rank": settings.rank,
        "replace_weight": True,
        "start": settings.start,
        "target_modules": hidden,
        "modules_to_save": sorted(owners.difference(hidden)),
    }


def predict(model: nn.Module, split: Split) -> Tensor:  # [N, classes]
    model.eval()
    with torch.no_grad():
        return torch.cat([model(split.batch(index)[0]) for index in torch.arange(len(split.labels)).split(1000)])


def measured_on(settings: Settings, training: Split, test: Split) -> list[Split]:
    """The test images and, where training images are to be measured, those."""
    return [test, training.first(settings.measured)] if settings.measured else [test]


def measured(shown: list[Split], logits: list[Tensor]) -> dict[str, float | None]:
    """Test accuracy; also loss and accuracy on training images where those are measured."""
    values = {"test_accuracy": _share_right(logits[0], shown[0])}
    if len(shown) > 1:
        loss = cross_entropy(logits[1], shown[1].labels).item()
        values |= {"train_accuracy": _share_right(logits[1], shown[1]), "loss": finite(loss)}
    return values


def _share_right(logits: Tensor, split: Split) -> float:
    return (logits.argmax(1) == split.labels).double().mean().item()


def evaluated_accuracy(logits: Tensor, split: Split) -> float:
    metric = evaluate.load(str(ACCURACY), keep_in_memory=True)
    return metric.compute(predictions=logits.argmax(1).cpu(), references=split.labels.cpu())["accuracy"]


def save_and_reload(model: nn.Module, network: nn.Module, split: Split, folder: Path) -> dict[str, Any]:
    """Saves the adapter, loads it onto a network built again, and compares the outputs of the two."""
    model.save_pretrained(folder)
    reloaded = PeftModel.from_pretrained(network.to(split.images.device), folder)
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
    recorder: Trajectory | None,
) -> float:
    """Trains one epoch; each process takes its share of every global batch. Returns the mean loss."""
    model.train()
    losses = []
    for index in batches(len(training.labels), settings.batch_size, random):
        images, labels = training.batch(index, random if settings.augment else None)
        share = slice(accelerator.process_index, None, accelerator.num_processes)
        losses.append(update(model, optimizer, accelerator, images[share], labels[share]))
        schedule.step()
        steps = schedule.last_epoch  # done so far
        if recorder is not None and settings.sample_steps and steps % settings.sample_steps == 0:
            recorder.add(model, step=steps // settings.sample_steps)
    return accelerator.reduce(torch.stack(losses).mean(), "mean").item()


def finite(value: float) -> float | None:
    """The value, or None for NaN and infinity, which JSON does not have."""
    return value if math.isfinite(value) else None
