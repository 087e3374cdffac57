"""The report of a pretraining: its accuracy, and its loss by epochs."""

from pathlib import Path

from matplotlib.ticker import MaxNLocator

from recipes.lab.results import Results
from recipes.reports.figures import headline, panels, save, style
from recipes.reports.labels import name
from recipes.vit_lora.settings import Settings


def text(runs: list[Settings], results: Results) -> str:
    accuracies = ((run, 100 * results.load(run)["final_accuracy"]) for run in runs)
    return "\n".join(f"{run}: {accuracy:.2f} %, kept as checkpoint {run.checkpoint}" for run, accuracy in accuracies)


def plot(runs: list[Settings], results: Results, file: Path) -> Path:
    """The training loss of each epoch."""
    figure, ((axis,),) = panels(1, 1, width=6.4, height=4.4)
    for at, run in enumerate(runs):
        losses = results.load(run)["train_loss"]
        axis.plot(range(1, len(losses) + 1), losses, label=f"seed {run.seed}", **style(at))
    axis.set(xlabel="epoch", ylabel="training loss")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend()
    headline(figure, f"Pretraining of a ViT on {name(runs[0].dataset)}")
    return save(figure, file)
