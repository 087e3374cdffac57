"""The pages: every Python block runs, every command names what is there, and the README's tree is the tree."""

import fnmatch
import os
import re
import shlex
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from recipes.grid import SEARCH, known_keys


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GUIDES = [*PAGES, *sorted((ROOT / "recipes").rglob("README.md"))]


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """The line where each fenced block of a language starts, and its text."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text[: match.start(1)].count("\n"), match[1]) for match in found]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """A page is one program, in a folder of its own; lines count as in the page."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for line, block in blocks(page, "python"):
        exec(compile("\n" * line + block, name(page), "exec"), namespace)


def commands(page: Path) -> list[str]:
    lines = "\n".join(block for _, block in blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def options(script: Path) -> set[str]:
    """What a script of recipes/ takes: those it declares, and for run.py every setting."""
    declared = set(re.findall(r'add_argument\("(--[\w-]+)"', script.read_text(encoding="utf-8")))
    settings = {f"--{key}" for key in [*known_keys(), *SEARCH]} if script.name == "run.py" else set()
    return declared | settings | {"--help"}


@pytest.mark.parametrize("page", [page for page in GUIDES if commands(page)], ids=name)
def test_commands_name_what_is_there(page):
    for command in commands(page):
        words = shlex.split(command, comments=True)
        for word in words:
            if re.search(r"\w/.*\.\w+$|^\w+\.(sh|py|md)$", word) and not word.startswith(("<", "http")):
                assert (ROOT / word).exists(), f"{command}: {word} is not there"
        scripts = [
            at for at, word in enumerate(words) if word.endswith(".py") and words[0] in ("python", "accelerate")
        ]
        if scripts:
            given = {word.split("=")[0] for word in words[scripts[0] :] if word.startswith("--")}
            unknown = given - options(ROOT / words[scripts[0]])
            assert not unknown, f"{command}: {words[scripts[0]]} takes no {sorted(unknown)}"


@pytest.mark.parametrize("page", GUIDES, ids=name)
def test_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", prose):
        assert (page.parent / target).exists(), target


def tree() -> list[str]:
    """The paths and patterns of the README's tree; folders stand on a line of their own, above what is in them."""
    entries, folders = [], []
    for line in blocks(ROOT / "README.md", "text")[0][1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = re.split(r"\s{2,}", line.strip())[0].split()
        folders = folders[:depth]
        if len(names) == 1 and names[0].endswith("/"):
            folders.append(names[0])
        else:
            entries += ["".join(folders) + entry for entry in names]
    return entries


def test_the_tree_is_the_tree():
    listed = ["git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard", "--deduplicate"]
    try:
        files = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("the files of the project are known where git is")
    files = [f for f in files if (ROOT / f).exists() and not f.startswith((".", f"shared{os.sep}"))]
    entries = tree()
    held = {
        entry: [f for f in files if fnmatch.fnmatch(f, entry) and f.count("/") == entry.count("/")]
        for entry in entries
    }
    assert not [entry for entry, found in held.items() if not found], "named in the tree, and not there"
    missing = set(files).difference(*held.values())
    assert not missing, "there, and not named in the tree"
    twice = [entry for entry, times in Counter(entries).items() if times > 1]
    assert not twice, "named twice"
