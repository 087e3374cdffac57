"""The kind of run of this recipe: a ViT fine-tuned by transformers' Trainer."""

from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from recipes.lab.kinds import Kind, Report
from recipes.lab.sweep import processes
from recipes.tasks.data import Split
from recipes.vit_lora.images import splits, whole
from recipes.vit_lora.settings import KEYS, Settings, settings
from recipes.vit_lora.training import train


@cache
def data(dataset: str, source: str) -> list[Split]:
    return [split.to(processes().device) for split in whole(dataset, source)]


def make(runs: list[Settings], output: Path, report: Report) -> list[dict[str, Any]]:
    (run,) = runs
    result, model = train(run, *splits(run, data(run.dataset, run.data)), output)
    if run.checkpoint and processes().is_main_process:
        model.save_pretrained(output / "checkpoints" / run.checkpoint)
    report(result["final_accuracy"])
    return [result]


def incomplete(run: Settings, output: Path) -> bool:
    """Whether the checkpoint that the run keeps is not there."""
    return bool(run.checkpoint) and not (output / "checkpoints" / run.checkpoint).is_dir()


def stays(part: dict[str, Any], key: str, values: list) -> bool:
    """Full fine-tuning and the head alone are baselines: settings of adapters do not narrow them."""
    methods = part.get("method", Settings.method)
    baseline = set(methods if isinstance(methods, list) else [methods]) <= {"full", "head"}
    return baseline and key in ("coordinates", "projection", "d", "rank")


KIND = Kind(
    name="vit_lora",
    settings=settings,
    make=make,
    keys=KEYS,
    defaults={f.name: f.default for f in fields(Settings)},
    stays=stays,
    incomplete=incomplete,
    report="vit_lora.report",
)
