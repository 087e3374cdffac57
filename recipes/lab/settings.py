"""Settings: a flat record of what a run is, and the name by which its result is found."""

import hashlib
import json
import math
from collections.abc import Collection, Iterator
from dataclasses import field, fields
from typing import Any, Protocol, Self


class Run(Protocol):
    """What the engine knows of a run."""

    @property
    def name(self) -> str: ...
    def record(self) -> dict[str, Any]: ...


def unnamed(default: Any) -> Any:
    """A setting of how a run is carried out, which changes neither its name nor its record."""
    return field(default=default, metadata={"unnamed": True})


class Named:
    """A frozen dataclass of settings, named by the hash of those that differ from their defaults.

    A default is never changed, and a new setting has a default that keeps the earlier behaviour, so that older results
    keep their names.
    """

    def record(self) -> dict[str, Any]:
        return {key: value.record() if isinstance(value, Named) else value for key, value in self._named()}

    @property
    def name(self) -> str:
        plain = {key: value.name if isinstance(value, Named) else value for key, value in self._named()}
        return digest({key: value for key, value in plain.items() if value != getattr(type(self), key)})

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        """A run from one point of the grid.

        Raises:
            ValueError: for a value of another type, and all that the class refuses.
        """
        return cls(**{key: typed(key, value, cls.__annotations__[key]) for key, value in values.items()})

    def _named(self) -> Iterator[tuple[str, Any]]:
        return ((f.name, getattr(self, f.name)) for f in fields(self) if not f.metadata)

    def _check(self, choices: dict[str, Collection], least: dict[str, float]) -> None:
        """Raises ValueError for a value that is none of its choices, or a number that is too small or not finite."""
        for key, known in choices.items():
            if getattr(self, key) not in known:
                raise ValueError(f"`{key}` must be one of {', '.join(known)}, got {getattr(self, key)!r}.")
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"`{f.name}` must be a finite number, got {value}.")
            if f.name in least and value < least[f.name]:
                raise ValueError(f"`{f.name}` must be at least {least[f.name]}, got {value}.")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"`seed` must be from 0 to 2**63 - 1, got {self.seed}.")

    def _reset(self, *keys: str) -> None:
        """Back to the defaults, where another choice leaves these without a meaning."""
        for key in keys:
            object.__setattr__(self, key, getattr(type(self), key))


class PlainSettings(dict):
    """Settings without defaults, named by the hash of all of them but those that begin with an underscore."""

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"A run of this kind needs the setting `{key}`, and has none: {self}; add it to the YAML.")

    def record(self) -> dict[str, Any]:
        return {key: value for key, value in self.items() if not key.startswith("_")}

    @property
    def name(self) -> str:
        return digest(self.record())

    def __str__(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in self.record().items())


def digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:12]


def typed(key: str, value: Any, kind: type) -> Any:
    """The value by way of its text, as the command line gives it: YAML reads 1e-3 as a string, and 1.5 is no int.

    Raises:
        ValueError: if the text is not of that type.
    """
    try:
        return {"true": True, "false": False}[str(value).lower()] if kind is bool else kind(str(value))
    except (ValueError, KeyError):
        raise ValueError(f"`{key}` must be of type {kind.__name__}, got {value!r}.") from None
