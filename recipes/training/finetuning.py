"""What recipes share that fine-tune a pretrained model by transformers' Trainer, with a new head beside an adapter."""

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import evaluate
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import EvalPrediction, TrainerCallback, TrainerControl, TrainerState

from recipes.training.train import ACCURACY


HELD_OUT = 1000
"""The last so many training examples validate, where a data set has no validation set."""


class Steps(TrainerCallback):
    """Milliseconds of each step, forward to update."""

    def __init__(self):
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def on_step_begin(self, arguments, state: TrainerState, control: TrainerControl, **rest) -> None:
        self.started = time.perf_counter(), time.process_time()

    def on_step_end(self, arguments, state: TrainerState, control: TrainerControl, **rest) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.wall.append(1e3 * (time.perf_counter() - self.started[0]))
        self.cpu.append(1e3 * (time.process_time() - self.started[1]))


class Task(NamedTuple):
    """What a model is trained and measured on, each batch as its `collate` makes it of examples."""

    training: Sequence
    validation: Sequence
    test: Sequence
    collate: Callable[[list], dict[str, Tensor]]
    classes: int
    longest: Any  # the training example that needs most memory
    order: str = "random"  # of the training examples, as Trainer calls it
    words: list[int] | None = None  # the token of each class, where the logits are those of a vocabulary


def chosen(count: int, total: int, dataset: str) -> list[int]:
    """Which training examples, of `total`: the same for every seed; all, for a count of 0.

    Raises:
        ValueError: if there are fewer than asked for.
    """
    if count > total:
        raise ValueError(
            f"`examples` must be at most the {total} training examples of {dataset!r}, got {count}; lower it, or give "
            "0 for all."
        )
    return torch.randperm(total, generator=torch.Generator().manual_seed(0))[: count or total].tolist()


def share_of_a_process(batch_size: int) -> int:
    """How many samples of a batch each of the processes that train together has.

    Raises:
        ValueError: if they cannot have as many.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if batch_size % processes:
        raise ValueError(
            f"`batch_size` must be a multiple of the {processes} processes, got {batch_size}; change one."
        )
    return batch_size // processes


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    metric = evaluate.load(str(ACCURACY), keep_in_memory=True)
    return metric.compute(predictions=prediction.predictions, references=prediction.label_ids)


def classes_of(logits: Tensor, labels: Tensor, words: list[int] | None = None) -> Tensor:
    """Predictions, of logits of classes or of a vocabulary in which these tokens are the classes."""
    return (logits if words is None else logits[:, words]).argmax(-1)


def digest(model: nn.Module, head: str) -> str:
    """Twelve hexadecimal digits for all weights but the head's: which pretraining a result comes from."""
    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if not name.startswith(head):
            total.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()[:12]


def groups(model: nn.Module, lr: float, head: str, head_lr: float) -> list[dict[str, Any]]:
    """Parameter groups of AdamW: what the method trains at `lr`, the head at `head_lr`; no weight decay."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    beside = [p for name, p in trained.items() if head in name.split(".")]
    rest = [p for name, p in trained.items() if head not in name.split(".")]
    both = [{"params": rest, "lr": lr}, {"params": beside, "lr": head_lr}]
    return [group | {"weight_decay": 0.0} for group in both if group["params"]]


def trainable(model: nn.Module, head: str) -> dict[str, int]:
    """How many numbers are trained: of the head, and of all else."""
    count = {"adapter": 0, "head": 0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            count["head" if head in name.split(".") else "adapter"] += parameter.numel()
    return count


def saved(model: nn.Module, base: nn.Module | None, inputs: dict[str, Tensor], folder: Path | None) -> dict[str, Any]:
    """Bytes of the file that a user would keep, the head in it; for adapters, what a reload changes in the logits.

    Args:
        base: The model before it was trained, to load the adapter into.
        inputs: A batch without labels.
        folder: Where the file stays; None: it does not. It is whole once it is there.
    """
    if folder is not None:
        folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder and folder.parent) as temporary:
        path = Path(temporary) / "adapter"
        path.mkdir()
        if isinstance(model, PeftModel):
            model.save_pretrained(path, save_embedding_layers=False)
        else:
            trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
            save_file(trained, path / "trained.safetensors")
        proof = {"bytes": sum(file.stat().st_size for file in path.glob("*.safetensors"))}
        if isinstance(model, PeftModel):
            device = next(iter(inputs.values())).device
            loaded = PeftModel.from_pretrained(base, path).to(device).eval()
            with torch.no_grad():
                difference = model.eval()(**inputs).logits - loaded(**inputs).logits
            proof["max_difference"] = difference.abs().max().item()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
            path.rename(folder)
    return proof
