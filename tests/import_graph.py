"""The import graph of this repository, drawn from its sources."""

import ast
from pathlib import Path


ROOT = Path(__file__).parents[1]


def modules(package: str) -> dict[str, Path]:
    """The files of a package by dotted name; `__init__.py` has the name of its folder."""
    paths = sorted((ROOT / package).rglob("*.py"))
    parts = {path: path.relative_to(ROOT).with_suffix("").parts for path in paths}
    return {".".join(names[:-1] if names[-1] == "__init__" else names): path for path, names in parts.items()}


def imports(name: str, path: Path) -> set[str]:
    """The dotted names that a module imports, anywhere: in functions and under TYPE_CHECKING too.

    `from a import b` counts as `a.b` if that is a file of this repository, otherwise as `a`.
    """
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            names |= {
                f"{source}.{alias.name}" if is_module(f"{source}.{alias.name}") else source for alias in node.names
            }
    return names


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def graph(package: str) -> dict[str, set[str]]:
    """Which modules of a package import which others of it.

    An import of a.b.c also runs a/__init__.py and a/b/__init__.py. These are not counted, because every module would
    then import its own package.
    """
    names = modules(package)
    return {name: imports(name, path) & names.keys() for name, path in names.items()}
