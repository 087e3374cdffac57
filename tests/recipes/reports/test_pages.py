"""The tables of the pages say what the committed results say."""

import pytest

from recipes.reports import pages
from recipes.reports.pages import ROOT, table, write_pages
from recipes.reports.tables import markers


MARKED = [(page, marker) for page in pages.pages() for marker in markers(page.read_text(encoding="utf-8"))]
IDS = [f"{page.parent.name}-{page.stem}-{marker}" for page, marker in MARKED]


@pytest.mark.parametrize(
    ("page", "marker"), MARKED, ids=[f"{page.parent.name}-{page.stem}-{marker}" for page, marker in MARKED]
)
def test_a_table_says_what_the_results_say(page, marker):
    """If it does not: `python recipes/run.py <the YAML> --report`, or `python <the script> --report`."""
    assert markers(page.read_text(encoding="utf-8"))[marker] == table(marker).strip()


def test_every_recipe_with_results_shows_them():
    with_results = {file.parent.name for file in (ROOT / "recipes").glob("*/*.jsonl")}
    assert with_results <= {page.parent.name for page, _ in MARKED}
    assert ROOT / "docs" / "results.md" in {page for page, _ in MARKED}


def test_a_report_writes_its_tables_and_leaves_all_else(tmp_path, monkeypatch):
    page = tmp_path / "recipes" / "tiny" / "README.md"
    page.parent.mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "results.md").write_text("Nothing here.\n")
    marker = "<!-- results: recipes/tiny/{} -->\n\n{}\n\n<!-- end of results -->\n"
    before = "# Tiny\n\n" + marker.format("a.yaml", "old") + "\nbetween\n\n" + marker.format("b.yaml", "kept")
    page.write_text(before)
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.setattr(pages, "table", lambda marker: f"| new of {marker} |")
    write_pages(page.parent / "a.yaml")
    assert page.read_text() == before.replace("\nold\n", "\n| new of recipes/tiny/a.yaml |\n")
    write_pages(page.parent / "c.yaml")
    assert page.read_text() == before.replace("\nold\n", "\n| new of recipes/tiny/a.yaml |\n")


def test_a_marker_names_a_table_that_is_there():
    with pytest.raises(ValueError, match=r"A marker must name a table of recipes/spectra/mlp.yaml, .*; got 'none'"):
        table("recipes/spectra/mlp.yaml none")
