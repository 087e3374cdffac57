"""One training by transformers' Trainer, with evaluate's accuracy."""

import copy
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import evaluate
import torch
from torch import Tensor, nn
from transformers import (
    EvalPrediction,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from recipes.tasks.data import Split
from recipes.vit_lora.images import Batches
from recipes.vit_lora.methods import base_model, digest, groups, saved, trainable, wrap
from recipes.vit_lora.settings import Settings


ACCURACY = Path(__file__).resolve().parents[1] / "metrics" / "accuracy"
EVALUATED_TOGETHER = 500


class Steps(TrainerCallback):
    """Milliseconds of each step, forward to update, and AdaLoRA's reallocation, which wants its gradients."""

    def __init__(self, adalora: nn.Module | None):
        self.adalora = adalora
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def on_step_begin(self, arguments, state: TrainerState, control: TrainerControl, **rest) -> None:
        self.started = time.perf_counter(), time.process_time()

    def on_optimizer_step(self, arguments, state: TrainerState, control: TrainerControl, **rest) -> None:
        if self.adalora is not None:
            self.adalora.update_and_allocate(state.global_step)

    def on_step_end(self, arguments, state: TrainerState, control: TrainerControl, **rest) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.wall.append(1e3 * (time.perf_counter() - self.started[0]))
        self.cpu.append(1e3 * (time.process_time() - self.started[1]))


def arguments(settings: Settings, folder: str, steps: int, shorter: int = 0) -> TrainingArguments:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if settings.batch_size % processes:
        raise ValueError(
            f"`batch_size` must be a multiple of the {processes} processes, got {settings.batch_size}; change one."
        )
    return TrainingArguments(
        folder,
        num_train_epochs=settings.epochs,
        max_steps=shorter or -1,
        per_device_train_batch_size=settings.batch_size // processes,
        per_device_eval_batch_size=min(EVALUATED_TOGETHER, 8 * settings.batch_size),
        lr_scheduler_type="cosine",
        warmup_steps=round(settings.warmup * steps),
        max_grad_norm=0.0,  # the gradient of theta_d has another scale than that of weights
        seed=settings.seed,
        bf16=settings.bf16,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_drop_last=True,
        dataloader_pin_memory=False,  # the images are on the device
        remove_unused_columns=False,
        label_names=["labels"],
        logging_strategy="epoch",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    metric = evaluate.load(str(ACCURACY), keep_in_memory=True)
    return metric.compute(predictions=prediction.predictions, references=prediction.label_ids)


def classes_of(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.argmax(-1)


def train(
    settings: Settings, training: Split, measured: Split, output: Path, shorter: int = 0
) -> tuple[dict[str, Any], nn.Module]:
    """What there is to say of a run, and the trained model.

    Args:
        output: The folder that holds checkpoints/, where a base may be, and adapters/.
        shorter: If given, so many steps and nothing is measured but those.
    """
    started = time.perf_counter()
    classes = 1 + int(max(split.labels.max() for split in (training, measured)))
    base = base_model(settings, training, classes, output / "checkpoints")
    steps = settings.epochs * (len(training.labels) // settings.batch_size)
    origin = copy.deepcopy(base) if settings.method not in ("full", "head") and not shorter else None
    result = {"base_digest": digest(base) if settings.base else None}
    model = wrap(base, settings, steps)
    callback = Steps(model.base_model if settings.method == "adalora" else None)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            # PeftModel.forward passes by AdaLoRA's own, which adds its orthogonal regularisation to the loss
            model.base_model if settings.method == "adalora" else model,
            arguments(settings, folder, steps, shorter),
            data_collator=Batches(training, settings, training=True),
            train_dataset=range(len(training.labels)),
            eval_dataset=range(len(measured.labels)),
            compute_metrics=accuracy,
            preprocess_logits_for_metrics=classes_of,
            callbacks=[callback],
            optimizers=(torch.optim.AdamW(groups(model, settings)), None),
        )
        trainer.remove_callback(PrinterCallback)
        # batches are equal: a mean needs no count, by which AdaLoRA's regularisation grows with the processes
        trainer.model_accepts_loss_kwargs = False
        set_up = time.perf_counter()
        trainer.train()
        trained = time.perf_counter()
        result |= {
            "parameters": sum(p.numel() for p in (origin or model).parameters()),
            "trainable": trainable(model),
            "step_ms": {"wall": statistics.median(callback.wall), "cpu": statistics.median(callback.cpu)},
            "seconds": {"setup": set_up - started, "train": trained - set_up},
        }
        if shorter:
            return result, model
        trainer.data_collator = Batches(measured, settings)
        trainer.args.dataloader_drop_last = False  # it would drop images of the evaluation too
        result["final_accuracy"] = trainer.evaluate()["eval_accuracy"]
    inputs = trainer.data_collator(range(min(64, len(measured.labels))))["pixel_values"].to(trainer.args.device)
    result["train_loss"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result["seconds"]["evaluate"] = time.perf_counter() - trained
    result["processes"] = trainer.args.world_size
    if trainer.is_world_process_zero():
        folder = output / "adapters" / settings.name if settings.save_adapter else None
        result["adapter"] = saved(model, settings, origin, inputs, folder)
    return result, model
