"""Tables in Markdown, and pages that hold them between two markers:

    <!-- results: recipes/intrinsic_dimension/mnist.yaml d_int90 -->
    | network | ...
    <!-- end of results -->

A marker is the path of a YAML or script in the repository and, where that has several tables, the name of one.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

import pandas as pd


END = "<!-- end of results -->"
MARKED = re.compile(rf"(<!-- results: (?P<marker>[^>\n]+?) -->\n)(?P<text>.*?)({END})", re.DOTALL)
BEGUN = re.compile(r"<!-- results:[^\n]*")


def check_common(runs: Iterable[Any], keys: Iterable[str]) -> None:
    """Raises ValueError if the runs differ in these settings, which a table must share."""
    for key in keys:
        if len(values := {getattr(run, key) for run in runs}) > 1:
            raise ValueError(f"A table must be of one `{key}`, got {', '.join(map(str, sorted(values)))}; give one.")


def markdown(header: Iterable[Any], rows: Iterable[Iterable[Any]]) -> list[str]:
    """The lines of a table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


def spread(mean: float, sd: float, digits: int = 2) -> str:
    """Mean and standard deviation; the mean alone where one run has no deviation."""
    return f"{mean:.{digits}f}" if pd.isna(sd) else f"{mean:.{digits}f} ± {sd:.{digits}f}"


def over_seeds(values: Iterable[float], digits: int = 2) -> str:
    """Mean and standard deviation of values, one a seed."""
    series = pd.Series(list(values), dtype=float)
    return spread(series.mean(), series.std(), digits)


def span(low: float, high: float) -> str:
    return f"{low}" if low == high else f"{low} to {high}"


def without_empty(header: list[str], rows: list[list[Any]], keep: int = 1) -> list[str]:
    """The table without the columns, after the first `keep`, in which no row says anything."""
    full = [at for at in range(len(header)) if at < keep or any(str(row[at]) for row in rows)]
    return markdown([header[at] for at in full], [[row[at] for at in full] for row in rows])


def by_rate(runs: pd.DataFrame, keys: dict[str, str]) -> list[str]:
    """Mean accuracy (%) by learning rate, the best of a row in bold; rates that were found are 0.

    Args:
        runs: A row a run, with `rate`, `accuracy` and the keys.
        keys: Columns that tell the rows of the table apart, and their headings.
    """
    grid = runs.pivot_table(index=list(keys), columns="rate", values="accuracy", sort=False)
    grid = grid[sorted(grid)]
    rows = []
    for index, row in grid.iterrows():
        cells = ["" if pd.isna(v) else f"**{v:.1f}**" if v == row.max() else f"{v:.1f}" for v in row]
        rows.append([*(value or "" for value in (index if isinstance(index, tuple) else (index,))), *cells])
    return without_empty([*keys.values(), *(f"{rate:g}" if rate else "found" for rate in grid)], rows)


def joined(parts: dict[str, str]) -> str:
    """All parts of a report, one after the other."""
    return "\n\n".join(part for part in parts.values() if part)


def markers(page: str) -> dict[str, str]:
    """The text between each pair of markers, by what the first one names.

    Raises:
        ValueError: if one has no end.
    """
    marked = {match["marker"]: match["text"].strip() for match in MARKED.finditer(page)}
    if len(begun := BEGUN.findall(page)) != len(MARKED.findall(page)):
        raise ValueError(f"Each <!-- results: ... --> must have an {END}, got {len(begun)} begun; end each.")
    return marked


def filled(page: str, text_of: Callable[[str], str | None]) -> str:
    """The page with the text of each marker; where that is None the present text stays."""

    def fill(match: re.Match) -> str:
        text = text_of(match["marker"])
        return match[0] if text is None else f"{match[1]}\n{text.strip()}\n\n{END}"

    return MARKED.sub(fill, page)
