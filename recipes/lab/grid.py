"""The grid of runs that a YAML file and the command line span.

    dataset: mnist
    seed: [0, 1, 2]
    runs:
      - {projection: full, lr: 1.0e-3}
      - {projection: [dense, fastfood], d: [100, 200], lr: 1.0}

A list is an axis of the grid; `runs`, where there is one, holds sub-grids, each over the values above it. A basis
comes from the trajectory of another run, whose settings are written `trajectory: {epochs: 50, lr: 0.1}` or
`trajectory.lr: 0.1`. In the place of a grid over d and seed, `d: auto` with a `threshold` of test accuracy, or a
`fraction` of that of full training in the same recipe, is a search for the smallest d that reaches it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from recipes.lab import axes
from recipes.lab.named import digest
from recipes.training.settings import COMMON, Settings


TRAJECTORY = "trajectory."
"""Before the name of a setting: that of the run whose trajectory gives the basis."""
REPORTS = ("dimension", "methods", "phases", "compression", "low_rank")
AUTO = "auto"
SEARCH = {"threshold": float, "fraction": float, "d_max": int, "d_min": int, "seeds": int, "probability": float}
SEARCH |= {"resolution": float, "max_runs": int}
"""What belongs to a search, and to nothing else."""


FIRST = "dataset model projection d seed projection_seed normalization nnz_per_row epochs batch_size optimizer lr "
FIRST += "momentum weight_decay schedule decay_epoch images augment standardize center measured burn_in burn_in_lr "
FIRST = (FIRST + "samples increments sample_steps pruned trajectory").split()
"""What a search is named by even at its default. Later settings are not, so that searches keep their names."""


class Search(NamedTuple):
    """The smallest d at which a run with these settings reaches a test accuracy after the last epoch."""

    settings: Settings  # with d and seed replaced
    threshold: float | None
    fraction: float | None  # of the mean of full training, in the place of a threshold
    options: dict[str, Any]  # of `subspace_peft.measure.find_dimension`
    full: list[Settings]  # the full trainings that `fraction` is of

    def run(self, d: int, seed: int) -> Settings:
        trajectory = self.settings.trajectory and replace(self.settings.trajectory, seed=seed)
        return replace(self.settings, d=d, seed=seed, trajectory=trajectory)

    def record(self) -> dict[str, Any]:
        full = {"full": [run.name for run in self.full]} if self.full else {}
        values = {"threshold": self.threshold, "fraction": self.fraction, "options": self.options}
        return {"settings": self.settings.record()} | values | full

    @property
    def name(self) -> str:
        return digest(self.record() | {"settings": _lasting(self.settings.record())})


def _lasting(record: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in record.items() if key in FIRST or value != getattr(Settings, key)}
    return kept | {"trajectory": record["trajectory"] and _lasting(record["trajectory"])}


class Recipe(NamedTuple):
    runs: list[Settings]
    published: dict[str, dict[str, int]]  # model -> source -> d_int90, marked in the figure
    report: str  # what is made of the results, one of REPORTS
    searches: list[Search]
    absolute: float | dict[str, float]  # the test accuracy that d_int90 is counted from, of all models or by model


def read(file: Path, overrides: dict[str, Any] | None = None) -> Recipe:
    recipe = yaml.safe_load(file.read_text())
    if not isinstance(recipe, dict) or not isinstance(recipe.get("runs", []), list):
        raise ValueError(
            f"A recipe must be a mapping of settings, and its `runs` a list of such; {str(file)!r} is not."
        )
    published, report = recipe.pop("published", {}), recipe.pop("report", "dimension")
    if report not in REPORTS:
        raise ValueError(f"`report` must be one of {', '.join(REPORTS)}, got {report!r}.")
    absolute = recipe.pop("absolute", 0.9)
    runs, found = grid(recipe, overrides), searches(recipe, overrides)
    if found and not runs and any("seed" in part for part in _parts(recipe, overrides)):
        raise ValueError("`d: auto` takes seeds from 0 on, got `seed`; leave it out, or give `seeds`, how many.")
    return Recipe(runs, published, report, found, absolute)


def grid(recipe: dict[str, Any], overrides: dict[str, Any] | None = None) -> list[Settings]:
    """Every run of a recipe once, in the order of seeds: the first results already cover the whole grid."""
    runs = {}
    for part in _parts(recipe, overrides):
        if not _is_search(part):
            _check_no_search(part, recipe, overrides)
            runs |= {run.name: run for run in _product(part) if run.name not in runs}
    return sorted(runs.values(), key=lambda settings: settings.seed)


def searches(recipe: dict[str, Any], overrides: dict[str, Any] | None = None) -> list[Search]:
    """Every `d: auto` of a recipe.

    Raises:
        ValueError: if one has no threshold, or no d_max, or asks for a fraction of what is not there.
    """
    found = {}
    for part in filter(_is_search, _parts(recipe, overrides)):
        options = {key: _typed(key, _single(key, part.pop(key))) for key in SEARCH if key in part}
        threshold, fraction = options.pop("threshold", None), options.pop("fraction", None)
        if (threshold is None) == (fraction is None):
            raise ValueError(
                "`d: auto` needs `threshold`, a test accuracy, or `fraction`, of full training; give one."
            )
        if "d_max" not in options:
            raise ValueError("`d: auto` needs `d_max`, the largest d to be tried; give it.")
        _check_search(threshold if fraction is None else fraction, options)
        runs = grid(recipe, overrides) if fraction is not None else []
        for settings in _product(part | {"d": options.get("d_min", 1), "seed": 0}):
            full = _full_training(settings, runs) if fraction is not None else []
            search = Search(settings, threshold, fraction, options, full)
            found.setdefault(search.name, search)
    return list(found.values())


def _full_training(settings: Settings, runs: list[Settings]) -> list[Settings]:
    """Of the network on the data set of a search."""
    task = settings.dataset, settings.model
    full = [run for run in runs if run.projection == "full" and (run.dataset, run.model) == task]
    if not full:
        raise ValueError(
            f"`fraction` of `d: auto` needs full training of {settings.model} on {settings.dataset} in the same "
            "recipe; add {projection: full}, or give `threshold`."
        )
    if (kinds := len({replace(run, seed=0) for run in full})) > 1:
        raise ValueError(
            f"`fraction` of `d: auto` needs full trainings of {settings.model} that differ in seed alone, got "
            f"{kinds} kinds; leave one, or give `threshold`."
        )
    return full


def _check_search(share: float, options: dict[str, Any]) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"`threshold` and `fraction` of `d: auto` must be above 0 and at most 1, got {share}.")
    if not 1 <= options.get("d_min", 1) <= options["d_max"]:
        raise ValueError(
            f"`d_max` of `d: auto` must be at least `d_min`, and that at least 1, got d_min = "
            f"{options.get('d_min', 1)} and d_max = {options['d_max']}."
        )


def _parts(recipe: dict[str, Any], overrides: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The sub-grids, each with the values above it and those of the command line."""
    shared = _flat({key: value for key, value in recipe.items() if key != "runs"})
    for part in recipe.get("runs", [{}]):
        part = _flat(part)
        if any(key.startswith(TRAJECTORY) for key in part):  # it stands in the same recipe
            part = {TRAJECTORY + key: shared[key] for key in shared if TRAJECTORY + key in known_keys()} | part
        given = dict(overrides or {})
        if part.get("projection") in ("full", ["full"]) and "full" not in given.get("projection", ()):
            given.pop("projection", None)  # the full training that a part asks for is no run in another subspace
        yield shared | part | given


def _check_no_search(part: dict[str, Any], recipe: dict[str, Any], overrides: dict[str, Any] | None) -> None:
    """What belongs to searches stands beside a grid only where a search is meant elsewhere."""
    lost = [key for key in SEARCH if key in part]
    auto = any(map(_is_search, _parts(recipe, None))) or any(map(_is_search, _parts(recipe, overrides)))
    values = part["d"] if isinstance(part.get("d"), list) else [part.get("d")]
    if AUTO in values and len(values) > 1:
        raise ValueError(f"`d: auto` must stand alone, got d = {values}; write the grid as a run of its own.")
    if lost and not auto:
        where = "with projection 'full', which has no d" if AUTO in values else "beside a grid; write `d: auto`"
        raise ValueError(f"`{lost[0]}` belongs to `d: auto`, got it {where}, or leave it out.")


def _is_search(part: dict[str, Any]) -> bool:
    return part.get("d") in (AUTO, [AUTO]) and part.get("projection") not in ("full", ["full"])


def _single(key: str, value: Any) -> Any:
    values = value if isinstance(value, list) else [value]
    if len(values) != 1:
        raise ValueError(f"`{key}` of `d: auto` must be one value, got {values}; write one search for each.")
    return values[0]


def known_keys() -> list[str]:
    own = [f.name for f in fields(Settings) if f.name != "trajectory"]
    return own + [TRAJECTORY + name for name in own if name not in COMMON]


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """{"trajectory": {"lr": 0.1}} -> {"trajectory.lr": 0.1}"""
    nested = values.get("trajectory") or {}
    own = {key: value for key, value in values.items() if key != "trajectory"}
    return own | {TRAJECTORY + key: value for key, value in nested.items()}


def _product(values: dict[str, Any]) -> Iterable[Settings]:
    values = {key: value for key, value in values.items() if key not in SEARCH and value not in (AUTO, [AUTO])}
    check_keys(values)
    for point in axes.points(values):
        typed = {key: _typed(key, value) for key, value in point.items()}
        own = {key: value for key, value in typed.items() if not key.startswith(TRAJECTORY)}
        trajectory = {k.removeprefix(TRAJECTORY): v for k, v in typed.items() if k not in own}
        if trajectory:
            own["trajectory"] = Settings(**{key: own[key] for key in COMMON if key in own} | trajectory)
        yield Settings(**own)


def check_keys(keys: Iterable[str]) -> None:
    axes.check_keys(keys, [*known_keys(), *SEARCH])


def _typed(key: str, value: Any) -> Any:
    return axes.typed(key, value, SEARCH.get(key) or Settings.__annotations__[key.removeprefix(TRAJECTORY)])
