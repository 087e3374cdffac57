"""Settings that are known by a name: the hash of what differs from their defaults."""

import hashlib
import json
from dataclasses import field, fields
from typing import Any


def unnamed(default: Any) -> Any:
    """A setting of how a run is carried out, which changes neither its name nor its record."""
    return field(default=default, metadata={"unnamed": True})


class Named:
    """A frozen dataclass of settings. A default is never changed, so that older results keep their names."""

    def record(self) -> dict[str, Any]:
        values = {key: getattr(self, key) for key in self._keys()}
        return {key: value.record() if isinstance(value, Named) else value for key, value in values.items()}

    @property
    def name(self) -> str:
        values = {key: getattr(self, key) for key in self._keys()}
        plain = {key: value.name if isinstance(value, Named) else value for key, value in values.items()}
        return digest({key: value for key, value in plain.items() if value != getattr(type(self), key)})

    def _keys(self) -> list[str]:
        return [f.name for f in fields(self) if not f.metadata]

    def _reset(self, *keys: str) -> None:
        """Back to the defaults, where a choice leaves these without a meaning."""
        for key in keys:
            object.__setattr__(self, key, getattr(type(self), key))


def digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:12]
