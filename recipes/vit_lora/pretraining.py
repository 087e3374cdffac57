"""The report of a pretraining: its accuracy, and its loss by epochs."""

from pathlib import Path

import matplotlib.pyplot as plt

from recipes.lab.results import Results
from recipes.reports.figures import save
from recipes.vit_lora.settings import Settings


def text(runs: list[Settings], results: Results) -> str:
    accuracies = ((run, 100 * results.load(run)["final_accuracy"]) for run in runs)
    return "\n".join(f"{run}: {accuracy:.2f} %, kept as checkpoint {run.checkpoint}" for run, accuracy in accuracies)


def plot(runs: list[Settings], results: Results, file: Path) -> Path:
    """The training loss of each epoch."""
    figure, axis = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    for run in runs:
        losses = results.load(run)["train_loss"]
        axis.plot(range(1, len(losses) + 1), losses, marker="o", label=str(run))
    axis.set(xlabel="epoch", ylabel="training loss", title="Pretraining")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    return save(figure, file)
