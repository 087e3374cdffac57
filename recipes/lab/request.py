"""SearchRequest: `d: auto` in a YAML, a search for the smallest d at which a run reaches an accuracy."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

from recipes.lab.settings import Named, digest, typed


AUTO = "auto"
SEARCH = {"threshold": float, "fraction": float, "d_max": int, "d_min": int, "seeds": int, "probability": float}
SEARCH |= {"resolution": float, "max_runs": int}
"""What belongs to a search, and to nothing else."""
ALWAYS = "dataset model projection d seed projection_seed normalization nnz_per_row epochs batch_size optimizer lr "
ALWAYS += "momentum weight_decay schedule decay_epoch images augment standardize center measured burn_in burn_in_lr "
ALWAYS = (ALWAYS + "samples increments sample_steps pruned trajectory").split()
"""The settings that a search is named by even at their defaults. Later settings are not, so that searches keep their
names."""
Values = dict[str, Any]


class SearchRequest(NamedTuple):
    """The smallest d at which a run with these settings reaches a test accuracy after the last epoch."""

    settings: Named  # with d and seed replaced
    threshold: float | None
    fraction: float | None  # of the mean of full training, in the place of a threshold
    options: dict[str, Any]  # of `subspace_peft.measure.find_dimension`
    full: list[Named]  # the full trainings that `fraction` is of

    def run(self, d: int, seed: int) -> Named:
        trajectory = getattr(self.settings, "trajectory", None)
        of_the_trajectory = {"trajectory": replace(trajectory, seed=seed)} if trajectory else {}
        return replace(self.settings, d=d, seed=seed, **of_the_trajectory)

    def record(self) -> dict[str, Any]:
        full = {"full": [run.name for run in self.full]} if self.full else {}
        values = {"threshold": self.threshold, "fraction": self.fraction, "options": self.options}
        return {"settings": self.settings.record()} | values | full

    @property
    def name(self) -> str:
        return digest(self.record() | {"settings": _lasting(self.settings.record(), type(self.settings))})


def _lasting(record: Values, kind: type[Named]) -> Values:
    kept = {key: value for key, value in record.items() if key in ALWAYS or value != getattr(kind, key)}
    if "trajectory" not in record:
        return kept
    return kept | {"trajectory": record["trajectory"] and _lasting(record["trajectory"], kind)}


def is_search(part: Values) -> bool:
    return part.get("d") in (AUTO, [AUTO]) and part.get("projection") not in ("full", ["full"])


def requests(
    part: Values, settings_of: Callable[[Values], Iterable[Named]], runs: Callable[[], list[Named]]
) -> list[SearchRequest]:
    """The searches of one sub-grid.

    Args:
        runs: Gives all runs of the recipe, among which are the full trainings that `fraction` is of.

    Raises:
        ValueError: if one has no threshold, or no d_max, or asks for a fraction of what is not there.
    """
    part = dict(part)
    options = {key: typed(key, _single(key, part.pop(key)), SEARCH[key]) for key in SEARCH if key in part}
    threshold, fraction = options.pop("threshold", None), options.pop("fraction", None)
    if (threshold is None) == (fraction is None):
        raise ValueError("`d: auto` needs `threshold`, a test accuracy, or `fraction`, of full training; give one.")
    if "d_max" not in options:
        raise ValueError("`d: auto` needs `d_max`, the largest d to be tried; give it.")
    _check(threshold if fraction is None else fraction, options)
    trained, searches = runs() if fraction is not None else [], []
    for settings in settings_of(part | {"d": options.get("d_min", 1), "seed": 0}):
        if settings.projection in ("full", "identity"):
            raise ValueError(
                f"`d: auto` needs a `projection` that has a d, got {settings.projection!r}; give one, such as fastjl, "
                "and write full training as a run of its own."
            )
        if replace(settings, d=options["d_max"]).d != options["d_max"]:
            raise ValueError(f"`d: auto` needs a run that has a d, got {settings}; choose another method.")
        full = _full_training(settings, trained) if fraction is not None else []
        searches.append(SearchRequest(settings, threshold, fraction, options, full))
    return searches


def _full_training(settings: Named, runs: list[Named]) -> list[Named]:
    """The full trainings of the network on the data set of a search."""
    task = settings.dataset, settings.model
    full = [run for run in runs if run.projection == "full" and (run.dataset, run.model) == task]
    if not full:
        raise ValueError(
            f"`fraction` of `d: auto` needs full training of {settings.model} on {settings.dataset} in the same "
            "recipe, {projection: full} of the kind `training`; add it, or give `threshold`."
        )
    if (kinds := len({replace(run, seed=0) for run in full})) > 1:
        raise ValueError(
            f"`fraction` of `d: auto` needs full trainings of {settings.model} that differ in seed alone, got "
            f"{kinds} kinds; leave one, or give `threshold`."
        )
    return full


def _check(share: float, options: Values) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"`threshold` and `fraction` of `d: auto` must be above 0 and at most 1, got {share}.")
    if not 1 <= options.get("d_min", 1) <= options["d_max"]:
        raise ValueError(
            f"`d_max` of `d: auto` must be at least `d_min`, and that at least 1, got d_min = "
            f"{options.get('d_min', 1)} and d_max = {options['d_max']}."
        )
    for key in ("seeds", "max_runs"):
        if options.get(key, 1) < 1:
            raise ValueError(f"`{key}` of `d: auto` must be at least 1, got {options[key]}.")
    if not 0 < options.get("probability", 0.5) < 1 or not 0 <= options.get("resolution", 0.1) < math.inf:
        raise ValueError(
            "`probability` of `d: auto` must be between 0 and 1 and `resolution` at least 0, got "
            f"{options.get('probability', 0.5)} and {options.get('resolution', 0.1)}."
        )


def _single(key: str, value: Any) -> Any:
    values = value if isinstance(value, list) else [value]
    if len(values) != 1:
        raise ValueError(f"`{key}` of `d: auto` must be one value, got {values}; write one search for each.")
    return values[0]


def check_alone(part: Values) -> None:
    """Raises ValueError where a sub-grid mixes `d: auto` with other d."""
    values = part["d"] if isinstance(part.get("d"), list) else [part.get("d")]
    if AUTO in values and len(values) > 1:
        raise ValueError(f"`d: auto` must stand alone, got d = {values}; write the grid as a run of its own.")


def check_no_search(part: Values) -> None:
    """Raises ValueError where what belongs to a search stands in a sub-grid, in a recipe without one."""
    check_alone(part)
    if lost := [key for key in SEARCH if key in part]:
        auto = part.get("d") in (AUTO, [AUTO])
        where = "with projection 'full', which has no d" if auto else "beside a grid; write `d: auto`"
        raise ValueError(f"`{lost[0]}` belongs to `d: auto`, got it {where}, or leave it out.")


def check_seeds(searches: list[SearchRequest], runs: list[Named], parts: list[Values]) -> None:
    if searches and not runs and any("seed" in part for part in parts):
        raise ValueError("`d: auto` takes seeds from 0 on, got `seed`; leave it out, or give `seeds`, how many.")
