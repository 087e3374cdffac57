"""The table of searches: the smallest d that reaches a threshold, with its interval and its cost."""

from recipes.lab.request import SEARCH, SearchRequest
from recipes.lab.results import Results
from recipes.lab.search import option
from recipes.reports.labels import apart, flat, name
from recipes.reports.tables import markdown, span


OPTIONS = [key for key in SEARCH if key not in ("threshold", "fraction")]


def text(searches: list[SearchRequest], results: Results) -> str:
    """The outcomes as Markdown."""
    ended = [(search, outcome) for search in searches if (outcome := results.load(search))]
    rows = []
    for (search, outcome), projection in zip(ended, projections([search for search, _ in ended]), strict=True):
        settings, above = search.settings, f"above {search.options['d_max']}"
        low, high = (above if end is None else end for end in outcome["interval"])
        rows.append(
            [name(settings.dataset), name(settings.model), projection, f"{100 * outcome['goal']:.2f}"]
            + [outcome["d"] or "none", span(low, high), len(outcome["made"]), f"{outcome['seconds']:.0f}"]
        )
    header = ["data", "network", "P", "threshold, %", "d", "95 % interval", "runs", "s of training"]
    return "\n".join([*markdown(header, rows), "", *(outcome["text"] for _, outcome in ended)])


def projections(searches: list[SearchRequest]) -> list[str]:
    """The projection of each search, and the settings and options in which its searches differ."""
    kinds: dict[tuple, list[int]] = {}
    for at, search in enumerate(searches):
        settings = search.settings
        kinds.setdefault((settings.dataset, settings.model, settings.projection), []).append(at)
    names = [name(search.settings.projection) for search in searches]
    for members in kinds.values():
        options = [{key: option(searches[at], key) for key in OPTIONS} for at in members]
        records = [
            flat(searches[at].settings.record(), ("d", "seed")) | chosen
            for at, chosen in zip(members, options, strict=True)
        ]
        for at, difference in zip(members, apart(records), strict=True):
            names[at] += f", {difference}" if difference else ""
    return names
