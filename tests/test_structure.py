"""Who may import whom (by the source, not by what happens to be loaded)."""

import ast
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
TORCH = {"torch"}
PEFT = {"torch", "peft", "transformers", "accelerate"}
ALLOWED = {  # file or folder of the package: other files of it, other packages
    "philox": (set(), TORCH),
    "hadamard": (set(), TORCH),
    "projections": ({"philox", "hadamard", "projections"}, TORCH),
    "starts": ({"philox"}, TORCH),
    "factored": ({"projections"}, {"torch", "transformers"}),
    "coordinates": ({"projections", "starts"}, TORCH),
    "samples": (set(), TORCH),
    "components": ({"samples"}, TORCH),
    "plain_model": (set(), TORCH),
    "recording": (set(), {"torch", "tqdm", "transformers"}),
    "trajectory": ({"components", "plain_model", "recording", "samples"}, {"torch", "safetensors"}),
    "given": ({"trajectory"}, {"torch", "peft", "safetensors"}),
    "config": ({"coordinates", "given", "projections", "starts"}, {"peft"}),
    "vectors": ({"plain_model", "projections"}, {"torch", "peft", "accelerate"}),
    "modules": (set(), {"torch", "transformers"}),
    "layer": ({"coordinates", "factored", "modules", "vectors"}, PEFT),
    "targets": ({"layer"}, PEFT),
    "plan": (
        {"coordinates", "factored", "given", "layer", "projections", "starts", "targets", "vectors"},
        {"torch", "peft", "accelerate"},
    ),
    "adapter_file": ({"coordinates", "given", "layer", "plan", "vectors"}, {"torch", "peft"}),
    "model": ({"adapter_file", "config", "given", "layer", "plan", "targets", "vectors"}, {"torch", "peft"}),
    "fold": ({"adapter_file", "plan", "projections"}, TORCH),
    "compress": ({"adapter_file", "factored", "layer"}, {"torch", "peft", "accelerate"}),
    "optim": ({"optim"}, TORCH),
    "trainer": ({"optim"}, {"torch", "accelerate", "transformers"}),
    "full_space": ({"adapter_file"}, TORCH),
    "landscape": ({"landscape"}, TORCH),
    "spectra": ({"layer", "plain_model", "recording", "spectra"}, {"torch", "peft", "safetensors"}),
    "groups": (set(), TORCH),
    "measure": ({"measure"}, {"numpy", "pandas", "tqdm"}),
    "register": ({"config", "model"}, {"peft"}),
}
STANDARD = {"__future__", "abc", "collections", "contextlib", "copy", "dataclasses", "difflib", "functools", "hashlib"}
STANDARD |= {"importlib", "inspect", "itertools", "json", "math", "numbers", "operator", "os", "re", "typing"}
STANDARD |= {"bisect", "pathlib", "statistics", "time", "warnings"}


def imports(path: Path) -> set[str]:
    """Top packages imported; those of the package itself as ".name"."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            inside = path.parent.name != "subspace_peft" and node.level == 1
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {"." + (path.parent.name if inside else name.split(".")[0]) for name in names}
    return found - STANDARD


PACKAGE = [
    path for path in sorted((ROOT / "subspace_peft").rglob("*.py")) if path != ROOT / "subspace_peft/__init__.py"
]


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: path.stem)
def test_the_package_imports_downwards_only(path):
    part = path.relative_to(ROOT / "subspace_peft").parts[0].removesuffix(".py")
    siblings, packages = ALLOWED[part]
    assert imports(path) <= {f".{name}" for name in siblings} | packages


def test_recipes_import_the_package_and_never_another_recipe():
    assert "recipes" not in set().union(*map(imports, PACKAGE))
    shared = {"accelerate", "metrics", "networks"}
    folders = {p.name for p in (ROOT / "recipes").iterdir() if p.is_dir()} - shared
    for path in (ROOT / "recipes").rglob("*.py"):
        mine = path.relative_to(ROOT / "recipes").parts[0]
        text = path.read_text(encoding="utf-8")
        for other in folders - {mine}:
            assert f"recipes.{other}" not in text, f"{path.name} of {mine} imports {other}"
