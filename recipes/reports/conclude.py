"""The end of a command: tables, the figure, and the proofs of the saved adapters."""

import inspect
from pathlib import Path
from typing import Any

from recipes.lab import search
from recipes.lab.grid import Recipe
from recipes.lab.results import Results
from recipes.lab.settings import Run
from recipes.reports import searches


def conclude(recipe: Recipe, results: Results, figure: Path) -> bool:
    """Prints what all results so far say, and draws the figure. False where there are no results yet."""
    runs = all_runs(recipe, results)
    missing = [run for run in runs if not results.has(run)]
    if missing:
        print(f"\n{len(missing)} of {len(runs)} runs have no result yet, or are still held by other processes.")
    if pending := sum(not results.has(request) for request in recipe.searches):
        print(f"\n{pending} of {len(recipe.searches)} searches have not ended, or are still held by other processes.")
    if len(missing) == len(runs):
        return False
    for words in texts(recipe, results).values():
        print(f"\n{words}")
    called(recipe, recipe.report.plot, shown(runs, results), results, figure)
    print(f"\nfigure: {figure}")
    for run in runs:
        if getattr(run, "save_adapter", False) and (proof := results.load(run).get("adapter")):
            print(f"saved adapter: {results.output / 'adapters' / run.name}, {proof['bytes']} bytes of weights")
            equal = "outputs equal" if proof["max_difference"] == 0 else "OUTPUTS DIFFER"
            print(f"reloaded adapter: {equal} (max difference {proof['max_difference']})")
    return True


def all_runs(recipe: Recipe, results: Results) -> list[Run]:
    """The runs of the grid, and those that searches made."""
    return list({run.name: run for run in [*recipe.runs, *search.made(recipe.searches, results)]}.values())


def texts(recipe: Recipe, results: Results) -> dict[str, str]:
    """The tables of a recipe by their names; the searches' is called "searches"."""
    tables = {"searches": searches.text(recipe.searches, results)} if recipe.searches else {}
    if recipe.runs:  # a d that a search chose is no grid
        runs = shown(recipe.runs, results)
        parts = getattr(recipe.report, "parts", None)
        tables |= (
            called(recipe, parts, runs, results) if parts else {"": called(recipe, recipe.report.text, runs, results)}
        )
    return tables


def check(recipe: Recipe) -> None:
    """Raises ValueError, before anything is trained, for runs that the report could not show."""
    if (checked := getattr(recipe.report, "check", None)) and recipe.runs:
        checked(recipe.runs)


def shown(runs: list[Run], results: Results) -> list[Run]:
    return [run for run in runs if results.has(run)]


def called(recipe: Recipe, function: Any, *arguments: Any) -> Any:
    """The function with what the YAML tells it."""
    known = inspect.signature(function).parameters
    return function(*arguments, **{key: value for key, value in recipe.choices.items() if key in known})
