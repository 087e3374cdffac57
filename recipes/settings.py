"""What a run is: a flat record of settings, and the grid of runs that a YAML file and the command line span.

    dataset: mnist
    seed: [0, 1, 2]
    runs:
      - {projection: full, lr: 1.0e-3}
      - {projection: [dense, fastfood], d: [100, 200], lr: 1.0}

A list is an axis of the grid; `runs`, where there is one, holds sub-grids, each over the values above it.
"""

import difflib
import hashlib
import itertools
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from recipes.models import MODELS, SHAPES
from subspace_peft.projections import PROJECTIONS


OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
SCHEDULES = {"constant": lambda t: 1.0, "cosine": lambda t: 0.5 + 0.5 * math.cos(math.pi * t)}
"""The factor on the learning rate after a share t of all steps."""
CHOICES = {
    "dataset": SHAPES,
    "model": MODELS,
    "projection": ["full", *PROJECTIONS],
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
}


def _unnamed(default: Any) -> Any:
    """A setting of how a run is carried out, which changes neither its name nor its record."""
    return field(default=default, metadata={"unnamed": True})


@dataclass(frozen=True)
class Settings:
    """One run. Its name is the hash of what differs from these defaults, so a default is never changed."""

    dataset: str = "digits"
    model: str = "lenet"
    projection: str = "full"  # full: every weight is trained, without a subspace
    d: int = 0
    seed: int = 0  # of the network, of P and of the order of the batches
    normalization: str = "columns"
    nnz_per_row: int = 0  # 0: what the projection takes by itself
    epochs: int = 10
    batch_size: int = 128
    optimizer: str = "adam"
    lr: float = 1e-3
    momentum: float = 0.0
    schedule: str = "constant"
    data: str = _unnamed("")  # a folder of parquet files, or another Hub id
    threads: int = _unnamed(0)  # 0: torch's choice
    save_adapter: bool = _unnamed(False)

    def __post_init__(self):
        for key, known in CHOICES.items():
            if getattr(self, key) not in known:
                raise ValueError(f"`{key}` must be one of {', '.join(known)}, got {getattr(self, key)!r}.")
        if self.projection == "full":
            for key in ("d", "normalization", "nnz_per_row", "save_adapter"):
                object.__setattr__(self, key, getattr(Settings, key))
        elif self.d < 1 and self.projection != "identity":
            raise ValueError(f"`d` must be at least 1 for projection {self.projection!r}, got {self.d}; give `d`.")
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(f"`momentum` belongs to optimizer 'sgd', got {self.optimizer!r}; leave it out.")

    def record(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if not f.metadata}

    @property
    def name(self) -> str:
        changed = {key: value for key, value in self.record().items() if value != getattr(Settings, key)}
        return hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:12]

    def __str__(self) -> str:
        return f"{self.model} {self.projection}" + (f" d={self.d}" if self.d else "") + f" seed={self.seed}"


class Recipe(NamedTuple):
    runs: list[Settings]
    published: dict[str, dict[str, int]]  # model -> source -> d_int90, marked in the figure


def read(file: Path, overrides: dict[str, Any] | None = None) -> Recipe:
    recipe = yaml.safe_load(file.read_text()) or {}
    published = recipe.pop("published", {})
    return Recipe(grid(recipe, overrides), published)


def grid(recipe: dict[str, Any], overrides: dict[str, Any] | None = None) -> list[Settings]:
    """Every run of a recipe once, in the order of seeds: the first results already cover the whole grid."""
    shared = {key: value for key, value in recipe.items() if key != "runs"}
    runs = {}
    for part in recipe.get("runs", [{}]):
        for settings in _product(shared | part | (overrides or {})):
            runs.setdefault(settings.name, settings)
    return sorted(runs.values(), key=lambda settings: settings.seed)


def _product(values: dict[str, Any]) -> Iterable[Settings]:
    check_keys(values)
    axes = [value if isinstance(value, list) else [value] for value in values.values()]
    for point in itertools.product(*axes):
        yield Settings(**{key: _typed(key, value) for key, value in zip(values, point, strict=True)})


def check_keys(keys: Iterable[str]) -> None:
    known = [f.name for f in fields(Settings)]
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3) or known
            raise ValueError(f"A setting must be one that `Settings` names, got `{key}`; near: {', '.join(near)}.")


def _typed(key: str, value: Any) -> Any:
    """The value by way of its text, as the command line gives it: YAML reads 1e-3 as a string, and 1.5 is no int."""
    kind = Settings.__annotations__[key]
    try:
        return {"true": True, "false": False}[str(value).lower()] if kind is bool else kind(str(value))
    except (ValueError, KeyError):
        raise ValueError(f"`{key}` must be of type {kind.__name__}, got {value!r}.") from None
