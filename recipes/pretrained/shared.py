"""A basis for one more task: the first singular vectors of what training moved on the other tasks."""

import os
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor

from recipes.pretrained import images
from recipes.pretrained.methods import HEAD
from recipes.pretrained.settings import Settings
from recipes.pretrained.training import adapter_of
from recipes.tasks.data import COARSE_CLASSES


def sources(run: Settings) -> list[Settings]:
    """The trainings of all norms and biases on each of the other tasks."""
    source = replace(
        run,
        projection="identity",
        d=0,
        examples=run.source_examples,
        epochs=run.source_epochs,
        source_examples=0,
        source_epochs=0,
    )
    return [replace(source, task=task) for task in range(COARSE_CLASSES[run.dataset]) if task != run.task]


def shared_basis(run: Settings, output: Path) -> Path:
    """A file with the first d left singular vectors of the increments [D, sources], by tensor.

    They are those of the other tasks alone, whose adapters are in the output folder.
    """
    moved = [_increments(source, output) for source in sources(run)]
    columns = torch.stack([torch.cat([tensor.flatten() for tensor in each.values()]) for each in moved], 1)
    basis = torch.linalg.svd(columns, full_matrices=False).U[:, : run.d].float()
    parts = basis.split([tensor.numel() for tensor in moved[0].values()])
    file = output / "bases" / f"{run.name}.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    written = file.with_suffix(f".{os.getpid()}")  # every process of a run may write it
    save_file({name: part.contiguous() for name, part in zip(moved[0], parts, strict=True)}, written)
    written.replace(file)
    return file


@cache
@torch.no_grad()
def _increments(source: Settings, output: Path) -> dict[str, Tensor]:
    """What the source moved, by tensor."""
    base = images.base_model(source, images.load(source).classes).double()  # so that no increment is rounded away
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    merged = PeftModel.from_pretrained(base, adapter_of(source, output)).merge_and_unload()
    after = dict(merged.named_parameters())
    return {name: after[name] - old for name, old in before.items() if old.dim() == 1 and not name.startswith(HEAD)}
