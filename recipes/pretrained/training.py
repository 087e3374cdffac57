"""One training by transformers' Trainer."""

import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from recipes.pretrained.methods import HEAD, wrap
from recipes.pretrained.settings import WITHOUT_ADAPTER, Settings
from recipes.training.finetuning import (
    Steps,
    Task,
    accuracy,
    classes_of,
    digest,
    groups,
    saved,
    share_of_a_process,
    trainable,
)
from recipes.training.memory import peak
from subspace_peft import SubspaceTrainer


EVALUATED_TOGETHER = 64
BaseModel = Callable[[Settings, int], nn.Module]


def arguments(settings: Settings, folder: str, examples: int, order: str) -> TrainingArguments:
    return TrainingArguments(
        folder,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=share_of_a_process(settings.batch_size),
        per_device_eval_batch_size=EVALUATED_TOGETHER,
        lr_scheduler_type="cosine",
        warmup_steps=round(settings.warmup * settings.epochs * -(-examples // settings.batch_size)),
        max_grad_norm=0.0,  # the gradient of theta_d has another scale than that of weights
        seed=settings.seed,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=False,
        train_sampling_strategy=order,
        remove_unused_columns=False,
        label_names=["labels"],
        logging_strategy="epoch",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def adapter_of(settings: Settings, output: Path) -> Path:
    """The folder of the adapter of a run that saves it."""
    return output / "adapters" / settings.name


def train(
    settings: Settings, task: Task, base_model: BaseModel, output: Path, basis: Path | None = None
) -> dict[str, Any]:
    """What there is to say of a run; the adapter, where it is saved, is in adapters/ of the output folder.

    Args:
        basis: The file with the columns of a `basis`.
    """
    started = time.perf_counter(), time.process_time()
    base = base_model(settings, task.classes)
    result = {"base_digest": digest(base, HEAD), "parameters": sum(p.numel() for p in base.parameters())}
    origin = None if settings.method in WITHOUT_ADAPTER else copy.deepcopy(base)
    model = wrap(base, settings, basis)
    callback, trained = Steps(), settings.method != "none"
    with tempfile.TemporaryDirectory() as folder:
        trainer = (SubspaceTrainer if settings.rates_are_found else Trainer)(
            model,
            arguments(settings, folder, len(task.training), task.order),
            data_collator=task.collate,
            train_dataset=task.training,
            compute_metrics=accuracy,
            preprocess_logits_for_metrics=partial(classes_of, words=task.words),
            callbacks=[callback],
            optimizers=(_adamw(model, settings) if trained and not settings.rates_are_found else None, None),
        )
        trainer.remove_callback(PrinterCallback)
        set_up = time.perf_counter(), time.process_time()
        if trained:
            trainer.train()
        done = time.perf_counter(), time.process_time()
        measured = {"validation": task.validation, "test": task.test}
        result["accuracy"] = {
            name: trainer.evaluate(split, metric_key_prefix=name)[f"{name}_accuracy"]
            for name, split in measured.items()
        }
        evaluated = time.perf_counter(), time.process_time()
    result |= {
        "examples": {name: len(split) for name, split in measured.items()} | {"training": len(task.training)},
        "processes": trainer.args.world_size,
        "trainable": trainable(model, HEAD),
        "seconds": _seconds({"setup": (started, set_up), "train": (set_up, done), "evaluate": (done, evaluated)}),
    }
    if not trained:
        return result
    result |= {
        "train_loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "step_ms": {"wall": statistics.median(callback.wall), "cpu": statistics.median(callback.cpu)},
        "rates": [group["initial_lr"] for group in trainer.optimizer.param_groups],
    }
    if trainer.is_world_process_zero():
        folder = adapter_of(settings, output) if settings.save_adapter else None
        batch = task.collate([task.validation[at] for at in range(min(EVALUATED_TOGETHER, len(task.validation)))])
        inputs = {key: value.to(trainer.args.device) for key, value in batch.items() if key != "labels"}
        result["adapter"] = saved(model, origin, inputs, folder)
    batch = task.collate(settings.batch_size * [task.longest])
    plain = base_model(settings, task.classes).to(trainer.args.device)
    batch = {key: value.to(trainer.args.device) for key, value in batch.items()}
    result["peak_bytes"] = peak(partial(_two_steps, plain, settings, batch, basis))
    return result


def _adamw(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    lr = settings.lr or Settings.lr  # where the rates are found, what a step holds is the same at any
    return torch.optim.AdamW(groups(model, lr, HEAD, settings.head_lr))


def _two_steps(base: nn.Module, settings: Settings, batch: dict[str, Tensor], basis: Path | None) -> None:
    """What a training holds beyond the base: adapter, activations, gradients, moments of AdamW."""
    model = wrap(base, settings, basis)
    optimizer = _adamw(model, settings)
    for _ in range(2):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _seconds(parts: dict[str, tuple[tuple[float, float], tuple[float, float]]]) -> dict[str, dict[str, float]]:
    """By the clock and of the processor."""
    return {name: {"wall": end[0] - begin[0], "cpu": end[1] - begin[1]} for name, (begin, end) in parts.items()}
