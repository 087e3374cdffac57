"""The pages: Python blocks run, commands and links name files that exist, docs/architecture.md holds the tree."""

import fnmatch
import os
import re
import shlex
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from recipes.lab.grid import known_keys, load
from recipes.lab.kinds import DEFAULT, find_kind


ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
GUIDES = [*PAGES, *sorted((ROOT / "recipes").rglob("README.md"))]
REPOSITORY = re.compile(
    r"https://(?:github\.com/subspace-peft/subspace_peft/blob|"
    r"raw\.githubusercontent\.com/subspace-peft/subspace_peft)/main/"
)


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """The line where each fenced block of a language starts, and its text."""
    text = page.read_text(encoding="utf-8")
    fences = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text[: match.start(1)].count("\n"), match[1]) for match in fences]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


# Trainer pins memory for an accelerator unless it is told not to, which a first example need not show.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name)
def test_python_blocks_run(page, tmp_path, monkeypatch, capsys):
    """A page is one program, in a folder of its own; lines count as in the page."""
    if "BitsAndBytesConfig" in page.read_text(encoding="utf-8"):
        pytest.importorskip("bitsandbytes")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for line, block in blocks(page, "python"):
        exec(compile("\n" * line + block, name(page), "exec"), namespace)
    if page == README:
        check_the_example(capsys.readouterr().out, tmp_path / "adapter")


def check_the_example(output: str, adapter: Path) -> None:
    """The comments of the README's example say what it prints and how large its file is."""
    ((_, example),) = blocks(README, "python")
    (printed,) = re.findall(r"print_trainable_parameters\(\)  # (.*)", example)
    assert printed in output
    (size,) = re.findall(r"# adapter_model\.safetensors: ([\d,]+) bytes", example)
    assert (adapter / "adapter_model.safetensors").stat().st_size == int(size.replace(",", ""))


def commands(page: Path) -> list[str]:
    lines = "\n".join(block for _, block in blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def words_of(command: str) -> list[str]:
    """A command's words; `-m recipes.run` as the file that it runs."""
    words = shlex.split(command, comments=True)
    for at, word in enumerate(words[:-1]):
        if word == "-m" and words[at + 1].startswith("recipes."):
            words[at : at + 2] = [words[at + 1].replace(".", "/") + ".py"]
    return words


def options(script: Path, words: list[str]) -> set[str]:
    """The options that a script and the parsers it shares declare; where it takes settings, also the recipe's."""
    sources = [script.read_text(encoding="utf-8")]
    for shared in (script.with_name("record.py"), ROOT / "recipes" / "lab" / "measurement.py"):
        if re.search(rf"import .*\b{shared.stem}\b|\b{shared.stem} import", "\n".join(sources)):
            sources.append(shared.read_text(encoding="utf-8"))
    declared = set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', "\n".join(sources)))
    settings = set()
    if script.name == "run.py" or "command.settings(" in sources[0]:
        recipes = [ROOT / word for word in words if word.startswith("recipes/") and word.endswith(".yaml")]
        recipe = load(recipes[-1]) if recipes and "accelerate" not in recipes[-1].parts else {}
        settings = {f"--{key}" for key in known_keys(find_kind(recipe.pop("kind", DEFAULT)), recipe)}
    return declared | settings | {"--help"}


@pytest.mark.parametrize("page", [page for page in GUIDES if commands(page)], ids=name)
def test_commands_name_what_is_there(page):
    for command in commands(page):
        words = words_of(command)
        for word in words:
            if re.search(r"\w/.*\.\w+$|^\w+\.(sh|py|md)$", word) and not word.startswith(("<", "http", "git+http")):
                assert (ROOT / word).exists(), f"{command}: {word} is not there"
        scripts = [
            at for at, word in enumerate(words) if word.endswith(".py") and words[0] in ("python", "accelerate")
        ]
        if scripts:
            given = {word.split("=")[0] for word in words[scripts[0] :] if word.startswith("--")}
            unknown = given - options(ROOT / words[scripts[0]], words)
            assert not unknown, f"{command}: {words[scripts[0]]} takes no {sorted(unknown)}"


@pytest.mark.parametrize("page", GUIDES, ids=name)
def test_links_lead_somewhere(page):
    """Relative links by the page's folder; absolute ones to this repository, pictures included, by its root."""
    for target in re.findall(r"\]\(([^)#]+)", prose(page)):
        if match := REPOSITORY.match(target):
            assert (ROOT / target[match.end() :]).exists(), target
        elif not target.startswith(("https:", "http:")):
            assert (page.parent / target).exists(), target
        else:
            assert "subspace-peft/subspace_peft" not in target, f"{target}: a page is at /blob/main/"


# A sentence begins a paragraph, an item of a list, a cell of a table, or follows another.
SENTENCE = r"(?:^(?: *[-*] | *\d+\. )?|\| *|[.!?:;][)\"*]* +|\*\* *)"


@pytest.mark.parametrize("page", GUIDES, ids=name)
def test_no_sentence_has_to_be_read_twice(page):
    """None begins with "Of" or "What is", which put the subject last. Headings are no sentences."""
    text = re.sub(r"^#+ .*$", "\n", prose(page), flags=re.MULTILINE)
    text = re.sub(r"(?<=\S)\n(?!\s*$|\s*[-*|] |\s*\d+\. )", " ", text, flags=re.MULTILINE)  # wrapped lines are one
    starts = re.findall(rf"{SENTENCE}((?:Of|What is)\b.{{0,60}})", text, re.MULTILINE)
    assert not starts


def test_the_readme_is_short_and_shows_first_what_decides():
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(" ".join(lines).split()) < 900  # as `wc -w` counts: code and tables too
    headings = [at for at, line in enumerate(lines) if line.startswith("## ")]
    (picture,) = [at for at, line in enumerate(lines) if line.startswith("![")]
    assert picture < min(25, headings[0])
    assert len(re.match(r"!\[(.*?)\]", lines[picture])[1]) > 20  # says what is seen, for those who cannot see it
    ((start, example),) = blocks(README, "python")
    assert start + example.count("\n") < 60
    assert len([line for line in example.splitlines() if line]) <= 15


def tree() -> list[str]:
    """The paths and patterns of the tree; folders stand on a line of their own, above what is in them."""
    entries, folders = [], []
    for line in blocks(ARCHITECTURE, "text")[0][1].splitlines():
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
    assert not [entry for entry, matches in held.items() if not matches], "named in the tree, and not there"
    missing = set(files).difference(*held.values())
    assert not missing, "there, and not named in the tree"
    twice = [entry for entry, times in Counter(entries).items() if times > 1]
    assert not twice, "named twice"
