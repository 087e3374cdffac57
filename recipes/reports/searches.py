"""The table of searches: the smallest d that reaches a threshold, with its interval and its cost."""

import pandas as pd

from recipes.lab.request import SEARCH, SearchRequest
from recipes.lab.results import Results
from recipes.lab.search import option
from recipes.reports.dimension import SETTINGS, apart, markdown


OPTIONS = [key for key in SEARCH if key not in ("threshold", "fraction")]


def text(searches: list[SearchRequest], results: Results) -> str:
    """The outcomes as Markdown."""
    ended = [(search, outcome) for search in searches if (outcome := results.load(search))]
    rows = []
    for (search, outcome), projection in zip(ended, projections([search for search, _ in ended]), strict=True):
        settings, above = search.settings, f"above {search.options['d_max']}"
        low, high = (above if end is None else end for end in outcome["interval"])
        rows.append(
            [settings.dataset, settings.model, projection, f"{100 * outcome['goal']:.2f}"]
            + [outcome["d"] or "none", low if low == high else f"{low} to {high}"]
            + [len(outcome["made"]), f"{outcome['seconds']:.0f}"]
        )
    header = ["dataset", "model", "projection", "threshold %", "d", "95 % interval", "runs", "s of training"]
    return "\n".join([*markdown(header, rows), "", *(outcome["text"] for _, outcome in ended)])


def projections(searches: list[SearchRequest]) -> list[str]:
    """The projection of each search, made longer by the settings and options in which its searches differ."""
    if not searches:
        return []
    options = [{key: option(search, key) for key in OPTIONS} for search in searches]
    rows = [search.settings.record() | row for search, row in zip(searches, options, strict=True)]
    return apart(pd.DataFrame(rows), [*SETTINGS, *OPTIONS]).sort_index().projection.tolist()
