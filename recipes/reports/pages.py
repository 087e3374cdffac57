"""The pages whose tables come from results: READMEs of recipes and pages of docs/."""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from recipes.lab.grid import read
from recipes.lab.results import Results
from recipes.reports.conclude import texts
from recipes.reports.tables import filled, markers


ROOT = Path(__file__).resolve().parents[2]


def pages() -> Iterator[Path]:
    """Those that have tables between markers."""
    for page in [*sorted((ROOT / "recipes").rglob("README.md")), *sorted((ROOT / "docs").glob("*.md"))]:
        if markers(page.read_text(encoding="utf-8")):
            yield page


def write_pages(file: Path | None = None) -> None:
    """The tables of a YAML or a script, or of all, wherever a page has them, as the committed results say."""

    def wanted(marker: str) -> bool:
        return file is None or ROOT / marker.split()[0] == file.resolve()

    for page in pages():
        text = page.read_text(encoding="utf-8")
        written = filled(text, lambda marker: table(marker) if wanted(marker) else None)
        if written != text:
            page.write_text(written, encoding="utf-8")
            print(f"tables written: {page}")


def table(marker: str) -> str:
    """The Markdown of a marker: the path of a YAML or a script and, where it has several tables, the name of one."""
    path, _, name = marker.partition(" ")
    tables = _of_script(path) if path.endswith(".py") else _of_recipe(ROOT / path)
    if name and name not in tables:
        raise ValueError(f"A marker must name a table of {path}, {', '.join(tables)}; got {name!r}.")
    return tables[name] if name else "\n\n".join(tables.values())


def _of_recipe(file: Path) -> dict[str, str]:
    return texts(read(file), Results(file.parent))


def _of_script(path: str) -> dict[str, str]:
    return import_module(path.removesuffix(".py").replace("/", ".")).tables()
