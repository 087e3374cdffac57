"""What tests of sweeps write and read: YAMLs, the command line's options, the results."""

import json
from pathlib import Path

from recipes import run
from recipes.lab.grid import grid, searches
from recipes.training.kind import KIND


RECIPES = Path(run.__file__).parent
RECIPE_FILES = sorted(set(RECIPES.glob("*/*.yaml")) - set(RECIPES.glob("accelerate/*")))


def written(file: Path, *lines: str) -> Path:
    file.write_text("\n".join(lines) + "\n")
    return file


def options(values: dict, output: Path) -> list[str]:
    return [word for key, value in values.items() for word in (f"--{key}", str(value))] + ["--output", str(output)]


def runs(recipe: dict, overrides: dict | None = None) -> list:
    """The runs of the default kind that a mapping spans."""
    return grid(KIND, recipe, overrides)


def requests(recipe: dict, overrides: dict | None = None) -> list:
    """The searches of the default kind that a mapping asks for."""
    return searches(KIND, recipe, overrides)


def results(folder: Path) -> dict[str, dict]:
    """By the name of the run."""
    return {file.stem: json.loads(file.read_text()) for file in sorted((folder / "results").glob("*.json"))}
