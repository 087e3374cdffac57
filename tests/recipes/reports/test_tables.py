"""Markdown, and markers around tables that come from results."""

import pandas as pd
import pytest

from recipes.reports import tables


PAGE = """# A page

<!-- results: recipes/a.yaml -->
| old |
<!-- end of results -->

Between.

<!-- results: recipes/b.yaml part -->

<!-- end of results -->
"""


def test_markdown_and_spread():
    assert tables.markdown(["a", "b"], [[1, 2.5]]) == ["| a | b |", "| --- | --- |", "| 1 | 2.5 |"]
    assert tables.over_seeds([1.0, 3.0]) == "2.00 ± 1.41"
    assert tables.over_seeds([1.0], digits=1) == "1.0"
    assert (tables.span(1, 1), tables.span(1, 2)) == ("1", "1 to 2")
    assert tables.without_empty(["a", "b", "c"], [["", "", 1], ["", "", ""]])[0] == "| a | c |"
    assert tables.joined({"a": "1", "b": "", "c": "2"}) == "1\n\n2"


def test_accuracies_by_rate_have_the_best_in_bold():
    runs = [("SGD", 2, 0.1, 50.0), ("SGD", 2, 0.1, 52.0), ("SGD", 2, 0.2, 60.0), ("Adam", 0, 0.2, 70.0)]
    lines = tables.by_rate(pd.DataFrame(runs, columns=["method", "d", "rate", "accuracy"]), {"method": "m", "d": "d"})
    assert lines == [
        "| m | d | 0.1 | 0.2 |",
        "| --- | --- | --- | --- |",
        "| SGD | 2 | 51.0 | **60.0** |",
        "| Adam |  |  | **70.0** |",
    ]


def test_markers_and_what_they_are_filled_with():
    assert tables.markers(PAGE) == {"recipes/a.yaml": "| old |", "recipes/b.yaml part": ""}
    filled = tables.filled(PAGE, {"recipes/a.yaml": "| new |\n"}.get)
    assert tables.markers(filled) == {"recipes/a.yaml": "| new |", "recipes/b.yaml part": ""}
    assert filled.replace("| new |", "| old |").split() == PAGE.split()
    assert tables.filled(filled, {"recipes/a.yaml": "| new |"}.get) == filled
    assert tables.markers("No table.") == {}


def test_a_marker_without_an_end_is_an_error():
    with pytest.raises(ValueError, match=r"must have an <!-- end of results -->, got 2 begun"):
        tables.markers(PAGE.replace(tables.END, "", 1))
