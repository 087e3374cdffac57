"""How a measurement beside other work ends: with the load of the machine next to its numbers."""

import os
from pathlib import Path
from typing import Any

from recipes.lab import environment


Load = tuple[float, float, float]


def keep(file: Path, record: dict[str, Any], before: Load, text: str) -> None:
    """Writes the record, and prints what it says; `before` is the load when the measurement began."""
    after = os.getloadavg()
    environment.write(file, {**record, "load": {"before": before, "after": after}})
    print(text)
    print(f"load before {before[0]:.1f}, after {after[0]:.1f}; {file}")
