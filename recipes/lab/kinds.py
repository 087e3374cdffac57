"""Kind: all that the engine knows of a run: its settings, how to make it, and what it needs and leaves."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from recipes.lab.settings import PlainSettings, Run


DEFAULT = "training"
Values = dict[str, Any]
Report = Callable[[float], None]
"""Gets the accuracy after each epoch."""


def _joined(shared: Values, part: Values) -> Values:
    return shared | part


@dataclass(frozen=True)
class Kind:
    """A kind of run. A YAML names it: `kind: vit_lora` is KIND of recipes/vit_lora/kind.py.

    Args:
        settings: A run from one point of the grid; raises ValueError for what no run could do.
        make: The results of runs that are made at once, in this process: (runs, output folder, report).
        keys: The settings that a YAML and the command line may name; None: those that the YAML names.
        defaults: What a setting is where the YAML does not name it.
        options: Settings from the command line alone, such as the folder of the data; they reach a run as "_<key>".
        joined: The values that a YAML shares and those of one of its sub-grids, as one grid.
        stays: Whether a sub-grid is a baseline, which this key does not narrow: (sub-grid, key, values).
        before: The runs whose trajectories, checkpoints or adapters a run needs.
        ready: Whether what one of them leaves is there and suffices: (run, the one before, output folder).
        incomplete: Whether a run with a result must be made again, because a file that it should leave is missing.
        kept: The same run, told to keep what other runs need.
        alike: What a run has in common with the runs that can be made at once with it; None: it is made alone.
        check_left: Raises ValueError if what a run left does not suffice for another: (run, other, output folder).
        accuracy: What a search for d compares with its threshold, in a result.
        seconds: How long a run trained, in its result.
        report: The module that makes tables and figures, unless the YAML names another.
    """

    name: str
    settings: Callable[[Values], Run]
    make: Callable[[list[Any], Path, Report], list[Values]]
    keys: Collection[str] | None = None
    defaults: Values = field(default_factory=dict)
    options: Collection[str] = ()
    joined: Callable[[Values, Values], Values] = _joined
    stays: Callable[[Values, str, list], bool] = lambda part, key, values: False
    before: Callable[[Any], list[Any]] = lambda run: []
    ready: Callable[[Any, Any, Path], bool] = lambda run, needed, output: True
    incomplete: Callable[[Any, Path], bool] = lambda run, output: False
    kept: Callable[[Any], Any] = lambda run: run
    alike: Callable[[Any], Any] = lambda run: None
    check_left: Callable[[Any, Any, Path], None] = lambda run, other, output: None
    accuracy: Callable[[Values], float] = lambda result: result["final_accuracy"]
    seconds: Callable[[Values], float] = lambda result: result["seconds"]["train"]
    report: str = ""


def measured(name: str, measure: Callable[[Any], Values], options: Collection[str] = (), report: str = "") -> Kind:
    """A kind of run whose settings are those that the YAML names, and whose result is what `measure` returns."""
    return Kind(
        name=name,
        settings=lambda values: PlainSettings({key: plain(value) for key, value in values.items()}),
        make=lambda runs, output, report: [measure(run) for run in runs],
        keys=None,
        options=options,
        report=report or name,
    )


def plain(value: Any) -> Any:
    """Convert text that is a number or a truth value, because the command line gives text and YAML reads 1e-3 as text;
    return anything else unchanged."""
    if isinstance(value, str):
        for kind in (int, float, lambda text: {"true": True, "false": False}[text.lower()]):
            try:
                return kind(value)
            except (ValueError, KeyError):
                pass
    return value


def find_kind(name: str) -> Kind:
    """KIND of recipes/<name>/kind.py or of the module recipes.<name>.

    Raises:
        ValueError: if there is none.
    """
    return _module(name, "kind", "KIND", (f"recipes.{name}.kind", f"recipes.{name}")).KIND


def find_report(name: str) -> Any:
    """The module of recipes/reports/, or of a recipe, that has `text` and `plot`.

    Raises:
        ValueError: if there is none.
    """
    return _module(name, "report", "text", (f"recipes.reports.{name}", f"recipes.{name}"))


def _module(name: str, key: str, needed: str, places: tuple[str, ...]) -> Any:
    for place in places:
        if isinstance(name, str) and all(part.isidentifier() for part in name.split(".")) and _exists(place):
            module = import_module(place)
            if hasattr(module, needed):
                return module
    raise ValueError(f"`{key}` must name a module of recipes/ that has {needed}, got {name!r}.")


def _exists(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a parent is no package
        return False
