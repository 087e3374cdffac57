"""What tests of sweeps write and read: a YAML, the command line's options, the results."""

import json
from pathlib import Path


def written(file: Path, *lines: str) -> Path:
    file.write_text("\n".join(lines) + "\n")
    return file


def options(values: dict, output: Path) -> list[str]:
    return [word for key, value in values.items() for word in (f"--{key}", str(value))] + ["--output", str(output)]


def results(folder: Path) -> dict[str, dict]:
    """By the name of the run."""
    return {file.stem: json.loads(file.read_text()) for file in sorted((folder / "results").glob("*.json"))}
