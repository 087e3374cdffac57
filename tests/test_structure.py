"""The structure of the sources: who may import whom, no circle, short files and functions, few files."""

import ast
import re
import shutil
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.import_graph import ROOT, graph, imports, modules


TORCH = {"torch"}
PARTS = {  # a folder or file of the package -> what all its files may import; ".name" is another part of the package
    "projections": TORCH,
    "coordinates": {".projections"} | TORCH,
    "adapter": {
        ".coordinates",
        ".projections",
        ".plain_model",
        ".slow_rate",
        "peft",
        "accelerate",
        "transformers.pytorch_utils",
    }
    | TORCH,
    "trajectory": {".plain_model", "safetensors"} | TORCH,
    "optim": TORCH,
    "landscape": TORCH,
    "spectra": {".evaluation", ".plain_model"} | TORCH,
    "measure": {"numpy", "pandas", "tqdm"},
    "rates": {".evaluation", ".sensitivity"} | TORCH,
    "slow_rate": {".rates"} | TORCH,
    "sensitivity": {".evaluation", ".optim", ".plain_model", "peft"} | TORCH,
    "evaluation": TORCH,
    "plain_model": TORCH,
    "recording": {"tqdm", "transformers"} | TORCH,
    "trainer": {".evaluation", ".optim", ".rates", ".sensitivity", "accelerate", "transformers"} | TORCH,
}
FILES = {  # what single files may import besides
    "coordinates.factored": {"transformers.pytorch_utils"},  # Conv1D
    "adapter.caches": {"transformers"},  # PreTrainedModel
    "adapter.given_projection": {".trajectory", "safetensors"},  # a basis may be a file or a folder of samples
    "adapter.expansion": {"transformers"},  # PreTrainedModel
    "adapter.quantised": {"bitsandbytes"},  # of what bitsandbytes packed, in a base that it quantised
    "adapter.renaming": {"transformers"},  # what its models' modules were called
    "trajectory.callback": {".recording"},
    "spectra.callback": {".recording"},
    "spectra.matrices": {".adapter.layer", ".adapter.quantised", "peft"},
    "spectra.record": {"safetensors"},
}
LAYERS = ["lab", "tasks", "training", "reports"]  # of recipes/: each may import those before it
PACKAGE = {name: path for name, path in modules("subspace_peft").items() if name != "subspace_peft"}
RECIPES = {name: path for name, path in modules("recipes").items() if name != "recipes"}
SOURCES = [path for package in ("subspace_peft", "recipes", "tests") for path in modules(package).values()]


def part_of(name: str) -> str:
    """The folder or file at the top of a package in which a module is."""
    return name.split(".")[1]


def is_allowed(name: str, allowed: set[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in allowed)


def test_imports_are_seen_in_functions_and_type_checking_blocks(tmp_path):
    path = tmp_path / "base.py"
    path.write_text(
        "import torch.nn\nfrom .philox import Philox\nfrom . import dense\n"
        "if TYPE_CHECKING:\n    from .blocks import Blocks\ndef f():\n    from ..coordinates import Weight\n"
    )
    names = {"philox", "dense", "blocks"}
    expected = {f"subspace_peft.projections.{name}" for name in names} | {"torch.nn", "subspace_peft.coordinates"}
    assert imports("subspace_peft.projections.base", path) == expected


@pytest.mark.parametrize("package", ["subspace_peft", "recipes", "tests"])
def test_no_modules_import_each_other_in_a_circle(package):
    try:
        TopologicalSorter(graph(package)).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize("name", PACKAGE)
def test_a_file_of_the_package_imports_only_what_its_part_may(name):
    part = part_of(name)
    allowed = PARTS[part] | FILES.get(name.removeprefix("subspace_peft."), set()) | {f".{part}"}
    names = {re.sub(r"^subspace_peft(?=\.)", "", other) for other in imports(name, PACKAGE[name])}
    names = {other for other in names if other.split(".")[0] not in sys.stdlib_module_names}
    assert not {other for other in names if not is_allowed(other, allowed)}


def test_the_rules_name_only_parts_and_files_that_exist():
    assert PARTS.keys() == {part_of(name) for name in PACKAGE}
    assert {f"subspace_peft.{name}" for name in FILES} <= PACKAGE.keys()


def test_the_package_imports_no_recipe_and_no_test():
    for name, path in modules("subspace_peft").items():
        assert not {other for other in imports(name, path) if is_allowed(other, {"recipes", "tests"})}, name


@pytest.mark.parametrize("name", sorted(RECIPES.keys() - {"recipes.run"}))
def test_a_file_of_recipes_imports_only_the_layers_below_it(name):
    part = part_of(name)
    below = LAYERS[: LAYERS.index(part)] if part in LAYERS else LAYERS
    allowed = {f"recipes.{folder}" for folder in [*below, part]}
    names = {other for other in imports(name, RECIPES[name]) if is_allowed(other, {"recipes", "tests"})}
    assert not {other for other in names if not is_allowed(other, allowed)}


@pytest.mark.parametrize("name", RECIPES)
def test_a_file_of_recipes_names_no_other_recipe(name):
    """Not in strings either, by which modules can be imported."""
    others = {part_of(other) for other in RECIPES} - {*LAYERS, part_of(name)}
    text = RECIPES[name].read_text(encoding="utf-8")
    assert not re.findall(rf"\brecipes\.(?:{'|'.join(others)})\b", text)


def test_no_file_is_longer_than_300_lines():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert not {path: length for path, length in lengths.items() if length > 300}


def test_no_function_is_longer_than_60_lines():
    """Decorators and docstring included."""
    lengths = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                lengths[f"{path.relative_to(ROOT)}:{first} {node.name}"] = node.end_lineno - first + 1
    assert not {place: length for place, length in lengths.items() if length > 60}


@pytest.mark.skipif(not shutil.which("git"), reason="there is no git")
def test_git_tracks_fewer_than_600_files():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("this copy of the sources is no git repository")
    assert len(tracked.stdout.splitlines()) < 600
