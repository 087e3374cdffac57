"""One JSON file a run, named by its settings, and a lock folder beside it while the run is under way.

Any number of processes, on any machines that share the folder, take the next run that has neither.
"""

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd

from recipes.lab.grid import Search
from recipes.lab.locks import Lock
from recipes.training.settings import Settings


class Results:
    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, settings: Settings | Search) -> Path:
        return self.folder / f"{settings.name}.json"

    def has(self, settings: Settings | Search) -> bool:
        return self.path(settings).exists()

    def take(self, settings: Settings | Search) -> bool:
        """Whether this process now holds the run."""
        return self._lock(settings).take()

    def release(self, settings: Settings | Search) -> None:
        self._lock(settings).release()

    def write(self, settings: Settings | Search, result: dict[str, Any]) -> None:
        """All of the result or nothing, whenever the process is stopped."""
        draft = self._lock(settings).folder / "result"
        draft.write_text(json.dumps({"settings": settings.record(), **result}, indent=1, allow_nan=False) + "\n")
        draft.replace(self.path(settings))

    def load(self, settings: Settings | Search) -> dict[str, Any]:
        """The result, empty if there is none.

        Raises:
            ValueError: if the file is damaged.
        """
        path = self.path(settings)
        if not path.exists():
            return {}
        try:
            return json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(
                f"A result must be JSON, got {str(path)!r}: {error}; delete it, to run it again."
            ) from None

    def table(self, runs: list[Settings]) -> pd.DataFrame:
        """One row for each run that has a result: its settings, D, accuracies and seconds of training.

        Where training images were measured, also the loss and the accuracy on those, after the last epoch and at best.

        Raises:
            ValueError: if a file is damaged, or was written by another version.
        """
        rows = []
        for run in runs:
            if result := self.load(run):
                try:
                    rows.append(run.record() | _numbers(run, result))
                except (KeyError, IndexError, TypeError) as error:
                    raise ValueError(
                        f"A result must be in the layout of this version, {str(self.path(run))!r} is not: "
                        f"{type(error).__name__} {error}; delete it, to run it again, or use its own version."
                    ) from None
        return pd.DataFrame(rows)

    def _lock(self, settings: Settings | Search) -> Lock:
        return Lock(self.folder / f"{settings.name}.lock")


def _numbers(run: Settings, result: dict[str, Any]) -> dict[str, float]:
    numbers = {key: result[key] for key in ("D", "final_accuracy", "best_accuracy")}
    if result["epochs"][-1]["train_loss"] is None:  # logits of nan have a first class, too
        numbers |= {"final_accuracy": math.nan}
    if run.measured:
        numbers |= _measured(result["epochs"])
    return numbers | {"seconds": result["seconds"]["train"]}


def _measured(epochs: list[dict[str, Any]]) -> dict[str, float]:
    accuracies = [epoch["train_accuracy"] for epoch in epochs]
    losses = [math.nan if epoch["loss"] is None else epoch["loss"] for epoch in epochs]
    return {
        "final_train_accuracy": accuracies[-1],
        "best_train_accuracy": max(accuracies),
        "final_loss": losses[-1],
        "best_loss": min(losses, key=lambda loss: math.inf if math.isnan(loss) else loss),
    }
