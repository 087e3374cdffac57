"""Full fine-tuning, LoRA, AdaLoRA and subspaces of a ViT by transformers' Trainer: the runs of a YAML.

    accelerate launch --config_file recipes/accelerate/cpu.yaml recipes/vit_lora/finetune.py \\
        recipes/vit_lora/mnist.yaml [--data <folder or Hub id>] [--seed 0 1 2] [--d 100 1000] [--output <folder>]

The command line wins over the file; several values are an axis of the grid in both. A run that has a result is not run
again, and several of these commands, on any machines that share the folder, share the work.
"""

import argparse
import sys
from functools import cache
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.lab import environment
from recipes.lab.results import Results
from recipes.lab.sharing import carry_out
from recipes.vit_lora import report
from recipes.vit_lora.images import splits, whole
from recipes.vit_lora.settings import KEYS, Settings, read
from recipes.vit_lora.training import train


def parser(description: str) -> argparse.ArgumentParser:
    """The YAML, the output folder, and every setting that the command line overrides."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("file", type=Path, help="the YAML")
    parser.add_argument("--output", type=Path, help="where results, checkpoints and plots go; the YAML's folder")
    parser.add_argument("--data", nargs="+", default=argparse.SUPPRESS, help="a folder of parquet files, or a Hub id")
    parser.add_argument("--seed", nargs="+", default=argparse.SUPPRESS)
    for key in KEYS:
        if key not in ("data", "seed"):
            parser.add_argument(f"--{key}", nargs="+", default=argparse.SUPPRESS, help=f"{getattr(Settings, key)!r}")
    return parser


class Sweep:
    def __init__(self, runs: list[Settings], output: Path):
        self.runs, self.output = runs, output
        self.state = PartialState(cpu=not torch.accelerator.is_available())
        self.results = Results(output / "results")
        self.whole = cache(lambda *source: [split.to(self.state.device) for split in whole(*source)])

    def wanted(self, run: Settings) -> bool:
        """Whether it has no result, or its checkpoint is not there."""
        kept = not run.checkpoint or (self.output / "checkpoints" / run.checkpoint).is_dir()
        return not (self.results.has(run) and kept)

    def carry_out(self) -> None:
        """Every run that is wanted and that no other process holds."""
        bar = tqdm(self.runs, unit="run", disable=not self.state.is_main_process)
        carry_out(bar, self.results, self.do, self.wanted, self.state)

    def do(self, run: Settings) -> None:
        result, model = train(run, *splits(run, self.whole(run.dataset, run.data)), self.output)
        if not self.state.is_main_process:
            return
        if run.checkpoint:
            model.save_pretrained(self.output / "checkpoints" / run.checkpoint)
        if not self.results.has(run):
            self.results.write(run, result | environment.record())
        tqdm.write(f"{run}: {100 * result['final_accuracy']:.2f} % in {result['seconds']['train']:.0f} s")


def main(arguments: list[str] | None = None) -> None:
    overrides = vars(parser(__doc__).parse_args(arguments))
    file, output = overrides.pop("file"), overrides.pop("output")
    output = output or file.parent
    recipe = read(file, overrides)
    sweep = Sweep(recipe.runs, output)
    sweep.carry_out()
    if sweep.state.is_main_process:
        report.conclude(recipe, sweep.results, output, file.stem)
    sweep.state.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Stopped: the same command does what is missing.")
