"""The points of a grid whose axes are the lists among its values, and what makes a value one of a named type."""

import difflib
import itertools
from collections.abc import Collection, Iterable, Iterator
from typing import Any


def points(values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """{"d": [1, 2], "lr": 0.1} -> {"d": 1, "lr": 0.1}, {"d": 2, "lr": 0.1}"""
    axes = [value if isinstance(value, list) else [value] for value in values.values()]
    for point in itertools.product(*axes):
        yield dict(zip(values, point, strict=True))


def typed(key: str, value: Any, kind: type) -> Any:
    """The value by way of its text, as the command line gives it: YAML reads 1e-3 as a string, and 1.5 is no int."""
    try:
        return {"true": True, "false": False}[str(value).lower()] if kind is bool else kind(str(value))
    except (ValueError, KeyError):
        raise ValueError(f"`{key}` must be of type {kind.__name__}, got {value!r}.") from None


def check_keys(keys: Iterable[str], known: Collection[str]) -> None:
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3) or known
            raise ValueError(f"A setting must be one that `Settings` names, got `{key}`; near: {', '.join(near)}.")
