"""The results of trainings as one table."""

import math
from typing import Any

import pandas as pd

from recipes.lab.results import Results
from recipes.training.settings import Settings


def table(runs: list[Settings], results: Results) -> pd.DataFrame:
    """One row for each run that has a result: its settings, D, accuracies and seconds of training.

    Where training images were measured, also the loss and the accuracy on those, after the last epoch and at best.

    Raises:
        ValueError: if a file is damaged, or was written by another version.
    """
    rows = []
    for run in runs:
        if result := results.load(run):
            try:
                rows.append(run.record() | _numbers(run, result))
            except (KeyError, IndexError, TypeError) as error:
                raise ValueError(
                    f"A result must be in the layout of this version, {str(results.path(run))!r} is not: "
                    f"{type(error).__name__} {error}; delete it, to run it again, or use its own version."
                ) from None
    return pd.DataFrame(rows)


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
