"""The kind of run of this recipe: a pretrained model fine-tuned by transformers' Trainer."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from recipes.lab.kinds import Kind, Report
from recipes.lab.request import SEARCH
from recipes.pretrained import images, text
from recipes.pretrained.settings import KEYS, WITHOUT_ADAPTER, Settings, settings
from recipes.pretrained.shared import shared_basis, sources
from recipes.pretrained.training import adapter_of, train


def make(runs: list[Settings], output: Path, report: Report) -> list[dict[str, Any]]:
    (run,) = runs
    task = images if run.has_images else text
    basis = shared_basis(run, output) if run.projection == "basis" else None
    result = train(run, task.load(run), task.base_model, output, basis)
    report(result["accuracy"]["validation"])
    return [result]


def stays(part: dict[str, Any], key: str, values: list) -> bool:
    """Full fine-tuning, BitFit and the head alone are baselines: settings of adapters do not narrow them.

    Nor does a rate narrow the runs whose rates are found.
    """
    if part.get("lr") in (0, [0]) and key in ("lr", "head_lr"):
        return True
    methods = part.get("method", Settings.method)
    baseline = set(methods if isinstance(methods, list) else [methods]) <= set(WITHOUT_ADAPTER)
    return baseline and key in ("coordinates", "projection", "parameters", "d", "rank", "modules")


KIND = Kind(
    name="pretrained",
    settings=settings,
    make=make,
    keys=[*KEYS, *SEARCH],
    defaults={f.name: f.default for f in fields(Settings)},
    stays=stays,
    before=lambda run: sources(run) if run.projection == "basis" else [],
    ready=lambda run, source, output: adapter_of(source, output).is_dir(),
    kept=lambda run: replace(run, save_adapter=True),
    accuracy=lambda result: result["accuracy"]["test"],
    seconds=lambda result: result["seconds"]["train"]["cpu"],
    report="pretrained.report",
)
