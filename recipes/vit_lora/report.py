"""What the results say, in tables."""

from pathlib import Path

from recipes.results import Results
from recipes.vit_lora.settings import Recipe


def conclude(recipe: Recipe, results: Results, output: Path, stem: str) -> None:
    for run in recipe.runs:
        if result := results.load(run):
            print(f"{run}: {100 * result['final_accuracy']:.2f} %, {result['trainable']} numbers trained")
