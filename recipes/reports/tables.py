"""Tables between markers in Markdown pages, which come from results."""

import re
from collections.abc import Callable


MARKED = re.compile(r"(<!-- results: (?P<marker>[^>]+?) -->\n).*?(<!-- end of results -->)", re.DOTALL)


def markers(page: str) -> dict[str, str]:
    """The text between each pair of markers, by what the first one names."""
    return {match["marker"]: match[0].split("-->\n", 1)[1].rpartition("<!--")[0].strip() for match in MARKED.finditer(page)}


def filled(page: str, text_of: Callable[[str], str | None]) -> str:
    """The page with the text of each marker; where that is None it stays as it is."""

    def fill(match: re.Match) -> str:
        text = text_of(match["marker"])
        return match[0] if text is None else f"{match[1]}\n{text.strip()}\n\n{match[3]}"

    return MARKED.sub(fill, page)
