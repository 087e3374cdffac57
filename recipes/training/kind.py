"""The default kind of run: a network trained from its start, in the whole space or in a subspace."""

from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from recipes.lab.kinds import Kind, Report
from recipes.lab.request import SEARCH
from recipes.lab.settings import typed
from recipes.lab.sweep import processes
from recipes.tasks.data import Split, load
from recipes.training.settings import COMMON, Settings
from recipes.training.together import alike, train_together
from recipes.training.train import train
from subspace_peft import Trajectory


TRAJECTORY = "trajectory."
"""Before the name of a setting: that of the run whose trajectory gives the basis."""
OF_SUBSPACES = {"d", "normalization", "nnz_per_row", "projection_seed", "samples", "increments", "pruned", "burn_in"}
OF_SUBSPACES |= {"burn_in_lr", "rank", "start", *SEARCH}
"""Settings that full training does not have."""
Values = dict[str, Any]


def keys() -> Iterator[str]:
    names = [f.name for f in fields(Settings) if f.name != "trajectory"]
    yield from names
    yield from (TRAJECTORY + name for name in names if name not in COMMON)
    yield from SEARCH


def joined(shared: Values, part: Values) -> Values:
    """The shared values and those of a sub-grid; a trajectory that the sub-grid names takes the shared values too."""
    shared, part = _flat(shared), _flat(part)
    if any(key.startswith(TRAJECTORY) for key in part):
        part = {TRAJECTORY + key: shared[key] for key in shared if TRAJECTORY + key in KEYS} | part
    return shared | part


def _flat(values: Values) -> Values:
    """{"trajectory": {"lr": 0.1}} -> {"trajectory.lr": 0.1}"""
    nested = values.get("trajectory") or {}
    if not isinstance(nested, dict):
        raise ValueError(f"`trajectory` must be a mapping of settings, got {nested!r}.")
    plain = {key: value for key, value in values.items() if key != "trajectory"}
    return plain | {TRAJECTORY + key: value for key, value in nested.items()}


def stays(part: Values, key: str, values: list) -> bool:
    """Full training is the baseline: settings of subspaces do not narrow it, and choosing a projection keeps it."""
    full = part.get("projection") in ("full", ["full"])
    return full and (
        key in OF_SUBSPACES or key.startswith(TRAJECTORY) or (key == "projection" and "full" not in values)
    )


def settings(values: Values) -> Settings:
    typed_values = {
        key: typed(key, value, Settings.__annotations__[key.removeprefix(TRAJECTORY)]) for key, value in values.items()
    }
    plain = {key: value for key, value in typed_values.items() if not key.startswith(TRAJECTORY)}
    trajectory = {key.removeprefix(TRAJECTORY): v for key, v in typed_values.items() if key not in plain}
    if trajectory:
        plain["trajectory"] = Settings(**{key: plain[key] for key in COMMON if key in plain} | trajectory)
    return Settings(**plain)


def trajectory_of(run: Settings, output: Path) -> Path:
    """The folder of the samples that a run writes or reads."""
    return output / "trajectories" / (run.trajectory.name if run.trajectory else run.name)


def ready(run: Settings, needed: Settings, output: Path) -> bool:
    """Whether the trajectory that a run needs has been recorded far enough."""
    return run.last_sample in Trajectory(trajectory_of(needed, output)).steps


def incomplete(run: Settings, output: Path) -> bool:
    if not run.save_trajectory:
        return False
    return len(Trajectory(trajectory_of(run, output))) <= (not run.sample_steps) * run.epochs


def check_left(run: Settings, other: Settings, output: Path) -> None:
    """Raises ValueError if a recorded trajectory is too short for a run that needs it."""
    recorded = max(Trajectory(trajectory_of(run, output)).steps, default=0)
    if other.last_sample > recorded:
        raise ValueError(
            f"`samples` must be at most the {recorded} of the trajectory, got {other.last_sample}: {other}; "
            "give the trajectory more `epochs`, or fewer `sample_steps`."
        )


@cache
def data(dataset: str, source: str) -> list[Split]:
    return [load(dataset, source, split).to(processes().device) for split in ("train", "test")]


def make(runs: list[Settings], output: Path, report: Report) -> list[Values]:
    first, splits = runs[0], data(runs[0].dataset, runs[0].data)
    if first.threads:
        torch.set_num_threads(first.threads)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())  # it holds what it prepares, for good
    if len(runs) > 1:
        return train_together(runs, accelerator, *splits, report)
    adapter = output / "adapters" / first.name if first.save_adapter else None
    samples = trajectory_of(first, output) if first.trajectory or first.save_trajectory else None
    return [train(first, accelerator, *splits, adapter, samples, report)]


def company(run: Settings) -> Settings | None:
    """The settings that runs trained together share; None where several processes train each run."""
    return alike(run) if processes().num_processes == 1 else None


KEYS = list(keys())
KIND = Kind(
    name="training",
    settings=settings,
    make=make,
    keys=KEYS,
    defaults={f.name: f.default for f in fields(Settings)},
    joined=joined,
    stays=stays,
    before=lambda run: [run.trajectory] if run.trajectory else [],
    ready=ready,
    incomplete=incomplete,
    kept=lambda run: replace(run, save_trajectory=True),
    alike=company,
    check_left=check_left,
    report="dimension",
)
