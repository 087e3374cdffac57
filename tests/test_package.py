"""The package: its wheel holds every file and no other, and its page on an index shows links and pictures."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import BytesParser
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
REPOSITORY = "https://github.com/subspace-peft/subspace_peft"


def build(source: Path, wheels: Path) -> zipfile.ZipFile:
    """The wheel of a source folder, built with the setuptools of this environment."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([*pip, "-w", wheels, source], check=True, capture_output=True, text=True, env=environment)
    (wheel,) = wheels.glob("*.whl")
    return zipfile.ZipFile(wheel)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    # A copy: a build in the checkout would leave build/ there, and add what an earlier build left in it.
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    shutil.copytree(ROOT / "subspace_peft", source / "subspace_peft", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    with build(source, folder / "wheels") as archive:
        yield archive


@pytest.fixture(scope="module")
def metadata(wheel) -> Message:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return BytesParser().parsebytes(wheel.read(name))


def test_the_wheel_holds_the_package_and_no_more(wheel):
    paths = (ROOT / "subspace_peft").rglob("*")
    files = {path.relative_to(ROOT).as_posix() for path in paths if path.is_file() and "__pycache__" not in path.parts}
    assert "subspace_peft/py.typed" in files
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == files
    for name in files:
        assert wheel.read(name) == (ROOT / name).read_bytes(), name


def test_every_folder_of_the_package_is_a_package():
    """A folder without __init__.py is imported all the same, and is left out of a wheel by stricter settings."""
    folders = {path.parent for path in (ROOT / "subspace_peft").rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").is_file()]


def test_the_metadata_name_the_repository(metadata):
    urls = dict(line.split(", ", 1) for line in metadata.get_all("Project-URL"))
    assert urls.keys() == {"Homepage", "Documentation", "Changelog", "Issues"}
    assert all(url.startswith(REPOSITORY) for url in urls.values())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "lora" in metadata["Keywords"].split(",")


def test_the_page_of_the_package_has_absolute_links_alone(metadata):
    """An index shows the README without the repository around it."""
    page = metadata.get_payload(decode=True).decode("utf-8")
    assert page == (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)]*)\)", page)
    assert targets
    assert not [target for target in targets if not target.startswith("https://")]
