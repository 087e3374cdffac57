"""One training by transformers' Trainer, with evaluate's accuracy."""

import copy
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from recipes.tasks.data import Split
from recipes.training.finetuning import (
    Steps,
    accuracy,
    classes_of,
    digest,
    groups,
    saved,
    share_of_a_process,
    trainable,
)
from recipes.vit_lora.images import Batches
from recipes.vit_lora.methods import HEAD, base_model, wrap
from recipes.vit_lora.settings import Settings


EVALUATED_TOGETHER = 500


class Reallocation(TrainerCallback):
    """Of AdaLoRA's ranks; it wants the gradients."""

    def __init__(self, adalora: nn.Module):
        self.adalora = adalora

    def on_optimizer_step(self, arguments, state: TrainerState, control: TrainerControl, **rest) -> None:
        self.adalora.update_and_allocate(state.global_step)


def arguments(settings: Settings, folder: str, steps: int, shorter: int = 0) -> TrainingArguments:
    return TrainingArguments(
        folder,
        num_train_epochs=settings.epochs,
        max_steps=shorter or -1,
        per_device_train_batch_size=share_of_a_process(settings.batch_size),
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
    result = {"base_digest": digest(base, HEAD) if settings.base else None}
    model = wrap(base, settings, steps)
    callback = Steps()
    reallocation = [Reallocation(model.base_model)] if settings.method == "adalora" else []
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
            callbacks=[callback, *reallocation],
            optimizers=(torch.optim.AdamW(groups(model, settings.lr, HEAD, settings.head_lr)), None),
        )
        trainer.remove_callback(PrinterCallback)
        # batches are equal: a mean needs no count, by which AdaLoRA's regularisation grows with the processes
        trainer.model_accepts_loss_kwargs = False
        set_up = time.perf_counter()
        trainer.train()
        trained = time.perf_counter()
        result |= {
            "parameters": sum(p.numel() for p in (origin or model).parameters()),
            "trainable": trainable(model, HEAD),
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
        with warnings.catch_warnings():
            # AdaLoRA may leave a layer no rank, and files its ranks under names of its own: PEFT warns of both
            warnings.filterwarnings("ignore", ".* LoRA tensor\\(s\\) have invalid shape")
            warnings.filterwarnings("ignore", "The following rank_pattern keys did not match")
            result["adapter"] = saved(model, origin, {"pixel_values": inputs}, folder)
    return result, model
