"""The grid of runs that a YAML file and the command line span.

    dataset: mnist
    seed: [0, 1, 2]
    runs:
      - {projection: full, lr: 1.0e-3}
      - {projection: [dense, fastfood], d: [100, 200], lr: 1.0}

A list is an axis of the grid; `runs`, where there is one, holds sub-grids, each over the values above it. `kind` says
what kind of run it is and `report` what is made of the results. In the place of a grid over d and seed, `d: auto` with
a `threshold` of test accuracy, or a `fraction` of that of full training in the same recipe, is a search for the
smallest d that reaches it.

The command line narrows the grid. A value that the file has for a key selects: what is left are the runs with that
value, and sub-grids that have other values alone are dropped. A value that the file does not have for that key takes
the place of those that it has.
"""

import difflib
import inspect
import itertools
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from recipes.lab.kinds import DEFAULT, Kind, find_kind, find_report
from recipes.lab.request import SEARCH, SearchRequest, check_alone, check_no_search, check_seeds, is_search, requests
from recipes.lab.settings import Run


Values = dict[str, Any]


class Recipe(NamedTuple):
    """What a YAML asks for."""

    kind: Kind
    runs: list[Run]  # each once, in the order of seeds: the first results already cover the whole grid
    searches: list[SearchRequest]
    report: Any  # the module that makes tables and figures
    choices: Values  # what the YAML tells the report: published values, thresholds


def read(file: Path, overrides: Values | None = None) -> Recipe:
    """The runs and searches of a YAML, narrowed by the command line.

    Raises:
        ValueError: if the file is no recipe, or a setting is unknown, of another type, or one that no run could have.
    """
    recipe = load(file)
    kind = find_kind(recipe.pop("kind", DEFAULT))
    report = find_report(recipe.pop("report", kind.report or kind.name))
    choices = {key: recipe.pop(key) for key in choices_of(report) if key in recipe}
    runs, asked, parts = _asked(kind, recipe, overrides)
    check_seeds(asked, runs, parts)
    return Recipe(kind, runs, asked, report, choices)


def load(file: Path) -> Values:
    """The mapping in a YAML file."""
    try:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"A recipe must be YAML, {str(file)!r} is not: {' '.join(str(error).split())}.") from None
    except OSError as error:
        raise ValueError(f"A recipe must be a file, got {str(file)!r}: {error.strerror}.") from None
    parts = recipe.get("runs", []) if isinstance(recipe, dict) else None
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise ValueError(
            f"A recipe must be a mapping of settings, and its `runs` a list of such; {str(file)!r} is not."
        )
    return recipe


def choices_of(report: Any) -> list[str]:
    """What a YAML may tell a report: the arguments of its `text` and `plot` that the engine does not give."""
    arguments = {**inspect.signature(report.text).parameters, **inspect.signature(report.plot).parameters}
    return [name for name in arguments if name not in ("runs", "results", "file")]


def grid(kind: Kind, recipe: Values, overrides: Values | None = None) -> list[Run]:
    """Every run of a recipe once."""
    return _asked(kind, recipe, overrides)[0]


def searches(kind: Kind, recipe: Values, overrides: Values | None = None) -> list[SearchRequest]:
    """Every `d: auto` of a recipe once."""
    return _asked(kind, recipe, overrides)[1]


def _asked(
    kind: Kind, recipe: Values, overrides: Values | None
) -> tuple[list[Run], list[SearchRequest], list[Values]]:
    """Runs, searches, and the sub-grids that they come from."""
    shared, parts = _split(kind, recipe)
    left = list(narrowed(kind, shared, parts, overrides or {}))
    _check_left(left, [kind.joined(shared, part) for part in parts], overrides or {})
    if not any(is_search(part) for part in [*left, *(kind.joined(shared, part) for part in parts)]):
        for part in left:
            check_no_search(part)
    return _runs(kind, left), _searches(kind, left), left


def _check_left(left: list[Values], parts: list[Values], given: Values) -> None:
    """Raises ValueError where a value that the file has is asked for and is in no run that the others leave."""
    for key, value in given.items():
        before, after = (
            {_text(each) for part in some for each in _listed(part.get(key, []))} for some in (parts, left)
        )
        for wanted in _listed(value):
            if not left or (_text(wanted) in before and _text(wanted) not in after):
                words = ", ".join(f"{name} {' '.join(map(str, _listed(each)))}" for name, each in given.items())
                raise ValueError(
                    f"The command line must leave a run with each of its values, none has {key} {wanted} of {words}; "
                    "give other values."
                )


def known_keys(kind: Kind, recipe: Values) -> list[str]:
    """What a YAML and the command line may set."""
    shared, parts = _split(kind, recipe)
    named = kind.keys if kind.keys is not None else dict.fromkeys(key for part in [shared, *parts] for key in part)
    return [*named, *kind.options]


def check_keys(keys: Iterable[str], known: Collection[str]) -> None:
    """Raises ValueError, with the names near to it, for a key that is unknown."""
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3) or known
            raise ValueError(f"A setting must be one that the recipe knows, got `{key}`; near: {', '.join(near)}.")


def _split(kind: Kind, recipe: Values) -> tuple[Values, list[Values]]:
    """What all sub-grids share, and the sub-grids."""
    shared = {key: value for key, value in recipe.items() if key != "runs"}
    return kind.joined({}, shared), [kind.joined({}, part) for part in recipe.get("runs") or [{}]]


def narrowed(kind: Kind, shared: Values, parts: list[Values], given: Values) -> Iterator[Values]:
    """The sub-grids that the command line leaves, each with all its values."""
    joined = [kind.joined(shared, part) for part in parts]
    options = {f"_{key}": _listed(given[key]) for key in kind.options if key in given}
    given = {key: _listed(value) for key, value in given.items() if key not in kind.options}
    order = list(kind.keys or given)  # what a run is comes before what belongs to it
    given = dict(sorted(given.items(), key=lambda item: order.index(item[0])))
    there = {key: {_text(each) for part in joined for each in _listed(part.get(key, []))} for key in given}
    for key, wanted in given.items():
        _check_type(kind, key, wanted, joined)
    for part in joined:
        values = dict(part)
        for key, wanted in given.items():
            if kind.stays(values, key, wanted):
                continue
            known = {_text(value) for value in wanted} & there[key]
            chosen = [value for value in wanted if _text(value) not in known]
            chosen += [value for value in _listed(part.get(key, kind.defaults.get(key))) if _text(value) in known]
            if not chosen:
                break
            values[key] = chosen
        else:
            yield values | options


def _check_type(kind: Kind, key: str, wanted: list[Any], parts: list[Values]) -> None:
    """Raises ValueError for text in the place of a number, where the file alone tells the type."""
    values = [each for part in parts for each in _listed(part.get(key, []))]
    if kind.keys is None and values and all(map(_is_number, values)):
        for value in wanted:
            if not _is_number(value):
                raise ValueError(f"`{key}` must be a number, got {value!r}.")


def _is_number(value: Any) -> bool:
    try:
        float(str(value))
    except ValueError:
        return False
    return True


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _text(value: Any) -> str:
    """How a value is told from others: 1e-3 of the command line is 0.001 of the file."""
    if _is_number(value):
        return repr(float(str(value)))
    return str(value).lower() if str(value).lower() in ("true", "false") else str(value)


def points(values: Values) -> Iterator[Values]:
    """{"d": [1, 2], "lr": 0.1} -> {"d": 1, "lr": 0.1}, {"d": 2, "lr": 0.1}"""
    if empty := [key for key, value in values.items() if value == []]:
        raise ValueError(f"`{empty[0]}` must have a value, got an empty list; give one, or leave it out.")
    for point in itertools.product(*map(_listed, values.values())):
        yield dict(zip(values, point, strict=True))


def _runs(kind: Kind, parts: list[Values]) -> list[Run]:
    runs = {}
    for part in parts:
        if kind.keys is not None:
            check_keys((key for key in part if not key.startswith("_")), kind.keys)
        if not is_search(part):
            check_alone(part)
            settings = {key: value for key, value in part.items() if key not in SEARCH and not _is_auto(value)}
            for run in map(kind.settings, points(settings)):
                runs.setdefault(run.name, run)
    return sorted(runs.values(), key=lambda run: run.record().get("seed", 0))


def _searches(kind: Kind, parts: list[Values]) -> list[SearchRequest]:
    searches: dict[str, SearchRequest] = {}
    for part in filter(is_search, parts):
        for request in requests(part, lambda values: map(kind.settings, points(values)), lambda: _runs(kind, parts)):
            searches.setdefault(request.name, request)
    return list(searches.values())


def _is_auto(value: Any) -> bool:
    return value in ("auto", ["auto"])
