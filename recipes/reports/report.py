"""What the results of a recipe say so far: its tables and its figure.

    python recipes/report.py recipes/intrinsic_dimension/mnist.yaml [--output <folder>]

`recipes/run.py` ends with the same, and this is for its YAMLs alone. Which report it is, they say.
"""

import argparse
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipes.lab import search
from recipes.lab.grid import Recipe, read
from recipes.lab.results import Results
from recipes.reports import compression, low_rank, phases
from recipes.reports import dimension as summary
from recipes.reports import optimisers as methods
from recipes.reports.figures import plot


REPORTS = {"methods": methods, "phases": phases, "compression": compression, "low_rank": low_rank}
"""Modules with `text(runs, results)` and `plot(runs, results, file)`; "dimension" is made of summary and plots."""


def conclude(recipe: Recipe, results: Results, output: Path, figure: Path) -> bool:
    """Prints what all results so far say, and the proofs of the saved adapters, and draws the figure.

    False where there are no results yet.
    """
    runs = list({run.name: run for run in [*recipe.runs, *search.made(recipe.searches, output)]}.values())
    missing = [run for run in runs if not results.has(run)]
    if missing:
        print(f"\n{len(missing)} of {len(runs)} runs have no result yet, or are still held by other processes.")
    if pending := search.pending(recipe.searches, output):
        print(f"\n{pending} of {len(recipe.searches)} searches have not ended, or are still held by other processes.")
    if len(missing) == len(runs):
        return False
    if recipe.searches:
        print(f"\n{search.text(recipe.searches, output)}")
    if report := REPORTS.get(recipe.report):
        print(f"\n{report.text(runs, results)}\n")
        report.plot(runs, results, figure)
    else:
        if recipe.runs:  # a d that a search chose is no grid to read d_int90 off
            print(f"\n{summary.text(results.table(recipe.runs), recipe.absolute)}\n")
        plot(results.table(runs), recipe.published, figure, recipe.absolute)
    print(f"figure: {figure}")
    for run in runs:
        proof = results.load(run).get("adapter") if run.save_adapter and run not in missing else None
        if proof:
            print(f"saved adapter: {output / 'adapters' / run.name}, {proof['bytes']} bytes of weights")
            equal = "outputs equal" if proof["max_difference"] == 0 else "OUTPUTS DIFFER"
            print(f"reloaded adapter: {equal} (max difference {proof['max_difference']})")
    return True


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the recipe")
    parser.add_argument("--output", type=Path, help="where the results are; the recipe's folder")
    options = parser.parse_args(arguments)
    output = options.output or options.file.parent
    figure = output / "plots" / f"{options.file.stem}.png"
    try:
        recipe = read(options.file)
    except ValueError as error:
        sys.exit(f"{options.file} must be a YAML of recipes/run.py: {error}")
    if not conclude(recipe, Results(output / "results"), output, figure):
        sys.exit(f"No run of {options.file} has a result in {output / 'results'} yet; recipes/run.py makes them.")


if __name__ == "__main__":
    main()
