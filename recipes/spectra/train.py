"""What training changes in the weights of nonlinear networks: singular values, singular subspaces, the increment.

    python recipes/spectra/train.py recipes/spectra/mlp.yaml [--data <folder>] [--output <folder>]
    python recipes/spectra/train.py recipes/spectra/mlp.yaml --plot

Of each watched weight W(t), at steps that rise geometrically: its singular values; how far the blocks of the first K
and the last K singular vectors and of those between turn (K classes; `subspace_peft.spectra`); and of the increment
W(t) - W(0) how much of its square lies in its first K, 2K directions, and inside those of an earlier increment.
"""

import argparse
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from transformers import ViTConfig, ViTForImageClassification


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes import environment
from recipes.data import Split, batches, load
from recipes.plots import save
from recipes.summary import markdown
from subspace_peft.spectra import BLOCKS, SIDES, Spectra, blocks, matrices


Settings = dict[str, Any]
DEFAULTS = {"activation": "relu", "start": "default", "image_size": 0, "images": 0, "bf16": False}
EVALUATED_TOGETHER = 500


def spanned(file: Path) -> list[Settings]:
    """The runs of a YAML: a list is an axis of the grid, `runs` holds sub-grids over the values above them."""
    recipe = yaml.safe_load(file.read_text())
    found = []
    for part in recipe.pop("runs", [{}]):
        axes = {key: v if isinstance(v, list) else [v] for key, v in (DEFAULTS | recipe | part).items()}
        found += [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]
    return found


# --------------------------------------------------------------------------------------------------------- the network


def network(settings: Settings, pixels: tuple[int, int, int], classes: int) -> nn.Module:
    """An MLP of `widths`, a small ViT of `shape`, or else the ViT of that folder or Hub id under a new classifier.

    Start "default": as torch and transformers draw it. "orthogonal": all singular values 1, biases 0.
    """
    torch.manual_seed(settings["seed"])
    channels, height, width = pixels
    if settings["model"] == "vit":
        shape = settings["shape"] | {"image_size": height, "num_channels": channels}
        model = ViTForImageClassification(ViTConfig(**shape, num_labels=classes))
    elif settings["model"] == "mlp":
        activation = {"relu": nn.ReLU, "linear": nn.Identity}[settings["activation"]]
        layers = [nn.Flatten()]
        sizes = [channels * height * width, *map(int, settings["widths"].split("-")), classes]
        for n, m in itertools.pairwise(sizes):
            layers += [nn.Linear(n, m), activation()]
        model = nn.Sequential(*layers[:-1])
    else:
        model = ViTForImageClassification.from_pretrained(
            settings["model"], num_labels=classes, ignore_mismatched_sizes=True
        )
    if settings["start"] == "orthogonal":
        for parameter in model.parameters():
            nn.init.orthogonal_(parameter) if parameter.ndim == 2 else nn.init.zeros_(parameter)
    return model


def logits(model: nn.Module, split: Split, index: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Of images scaled to [-1, 1]; and their labels."""
    x, size = split.images[index].float() / 127.5 - 1, settings["image_size"]
    if size and size != x.shape[-1]:
        x = interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=settings["bf16"]):
        found = model(x)
    return (found if isinstance(found, Tensor) else found.logits).float(), split.labels[index]


@torch.no_grad()
def accuracy(model: nn.Module, split: Split, settings: Settings) -> float:
    model.eval()
    parts = torch.arange(len(split.labels), device=split.labels.device).split(EVALUATED_TOGETHER)
    right = 0
    for index in parts:
        z, y = logits(model, split, index, settings)
        right += (z.argmax(1) == y).sum().item()
    model.train()
    return right / len(split.labels)


# ------------------------------------------------------------------------------------------------------------- one run


def measure(settings: Settings, data: str) -> dict[str, Any]:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    training, test = (load(settings["dataset"], data, part).to(device) for part in ("train", "test"))
    training = training.first(settings["images"] or len(training.labels))
    classes = 1 + int(training.labels.max())
    model = network(settings, tuple(training.images.shape[1:]), classes).to(device)
    make = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[settings["optimizer"]]
    optimizer = make(model.parameters(), lr=settings["lr"])
    generator, size = torch.Generator().manual_seed(settings["seed"]), settings["batch_size"]
    total = settings["epochs"] * (len(training.labels) // size)
    wanted = {0, total, *np.geomspace(1, total, settings["recorded"]).round().astype(int).tolist()}
    seen, losses, started = {0: watched(model, settings)}, [], time.process_time()
    order = (index for _ in range(settings["epochs"]) for index in batches(len(training.labels), size, generator))
    for step, index in enumerate(order, 1):
        z, y = logits(model, training, index.to(device), settings)
        loss = cross_entropy(z, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in wanted:
            seen[step] = watched(model, settings)
            losses.append(round(loss.item(), 4))
            print(f"step {step} of {total}: loss {loss.item():.3f}", flush=True)
    trained = time.process_time()
    reached = accuracy(model, test, settings)
    layers = dynamics(seen, classes, reference=int(settings["start"] == "orthogonal"))
    for name, layer in layers.items():
        layer["accuracy"] = truncated(model, name, seen[0][name], layer["directions"], test, settings)
    seconds = {"train": round(trained - started), "decompose": round(time.process_time() - trained)}
    result = {"classes": classes, "steps": sorted(seen), "loss": losses, "accuracy": reached, "cpu_seconds": seconds}
    return result | {"layers": layers}


def watched(model: nn.Module, settings: Settings) -> dict[str, Tensor]:
    return {name: matrix.clone() for name, matrix in matrices(model, settings["weights"])}


def dynamics(seen: dict[int, dict[str, Tensor]], K: int, reference: int) -> dict[str, Any]:
    """By weight, a list over steps each; see the README for what they say."""
    spectra = Spectra(rank=K, reference=reference)
    for step, weights in seen.items():
        spectra.add(weights, step)
    found = {}
    for name in spectra.weights:
        shape, values = seen[0][name].shape, spectra.singular_values(name)
        q = min(shape)
        kept = sorted({*range(min(2 * K, q)), *range(0, q, max(1, q // 40)), *range(max(0, q - 2 * K), q)})
        increments = [(weights[name] - seen[0][name]).double() for weights in seen.values()]
        found[name] = {
            "shape": list(shape),
            "kept": kept,
            "singular_values": digits(values[:, kept]),
            "change": digits([each.norm() / seen[0][name].norm() for each in increments]),
            "turned": {side: turned(spectra, name, side) for side in SIDES},
            **of_increments(increments, K),
        }
    return found


def turned(spectra: Spectra, name: str, side: str) -> dict[str, Any]:
    """By block the largest principal angle, and sum of sin^2 of all: how many of its directions left it."""
    found = {}
    for block in BLOCKS:
        angles = spectra.angles(name, side, block)
        if angles.shape[1]:
            found[block] = {"largest": digits(angles.amax(1)), "gone": digits(angles.sin().square().sum(1))}
    return found


def of_increments(increments: list[Tensor], K: int) -> dict[str, Any]:
    """Of W(t) - W(0): its first 3K singular values, and shares of its square.

    In its first K and 2K directions; `known`: what the last one has inside the 2K left and 2K right directions of
    that at t. `directions`: how many hold 90 % and 99 % of the last. `gaussian`: a normal matrix in place of it.
    """
    last, found = increments[-1], {"increment": [], "share_K": [], "share_2K": [], "known": []}
    for each in increments[1:]:
        U, sigma, Vh = torch.linalg.svd(each, full_matrices=False)
        share = sigma.square().cumsum(0) / sigma.square().sum()
        inside = U[:, : 2 * K].mT @ last @ Vh[: 2 * K].mT
        parts = (sigma[: 3 * K], share[:K][-1], share[: 2 * K][-1], (inside.norm() / last.norm()).square())
        for key, part in zip(found, parts, strict=True):
            found[key].append(digits(part))
    directions = {f"{level:.0%}": int((share < level).sum()) + 1 for level in (0.9, 0.99)}
    normal = torch.randn(last.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = torch.linalg.svdvals(normal).square()
    gaussian = {key: digits(noise[:n].sum() / noise.sum()) for key, n in (("share_K", K), ("share_2K", 2 * K))}
    return found | {"directions": directions | {"K": K, "2K": 2 * K}, "gaussian": gaussian}


@torch.no_grad()
def truncated(
    model: nn.Module, name: str, start: Tensor, directions: dict[str, int], test: Split, settings: Settings
) -> dict[str, float]:
    """Test accuracy with only the first directions of this weight's increment, and all else as trained."""
    weight = model.get_parameter(name)
    trained = weight.clone()
    U, sigma, Vh = torch.linalg.svd((trained.reshape(start.shape) - start).double(), full_matrices=False)
    found = {}
    for n in sorted({0, *directions.values()}):
        weight.copy_((start + (U[:, :n] * sigma[:n] @ Vh[:n]).to(start.dtype)).view_as(weight))
        found[str(n)] = accuracy(model, test, settings)
    weight.copy_(trained)
    return found


def digits(values: Any) -> Any:
    """Numbers of four digits; NaN is null."""
    if isinstance(values, Tensor):
        values = values.tolist()
    if isinstance(values, list):
        return [digits(each) for each in values]
    return float(f"{values:.4g}") if values == values else None


# -------------------------------------------------------------------------------------------------- tables and figures


def label(settings: Settings) -> str:
    words = [settings["model"], settings["activation"]] if settings["model"] == "mlp" else [settings["model"]]
    return f"{', '.join(words)}, {settings['start']} start, {settings['optimizer']}, seed {settings['seed']}"


def text(runs: list[dict[str, Any]]) -> str:
    """The end of each training: a line for each watched weight. Of top, middle and bottom: see `turned`, `_moved`."""
    rows = []
    for run in runs:
        print(f"{label(run['settings'])}: accuracy {100 * run['accuracy']:.2f} %, seconds {run['cpu_seconds']}")
        tenth = next(at for at, step in enumerate(run["steps"][1:]) if 10 * step >= run["steps"][-1])
        for name, layer in run["layers"].items():
            kept = [layer["accuracy"][str(n)] for n in (0, layer["directions"]["K"], layer["directions"]["2K"])]
            rows.append(
                [label(run["settings"]), f"{name}, {'x'.join(map(str, layer['shape']))}", f"{layer['change'][-1]:.2f}"]
                + [f"{100 * layer[key][-1]:.1f} ({100 * layer['gaussian'][key]:.0f})" for key in layer["gaussian"]]
                + [f"{layer['directions']['90%']}; {layer['directions']['99%']}"]
                + [f"{100 * layer['known'][at]:.0f}" for at in (0, tenth)]
                + ["; ".join(part(layer, block, run["classes"]) for block in BLOCKS) for part in (_moved, _gone)]
                + ["; ".join(f"{100 * each:.1f}" for each in [*kept, run["accuracy"]])]
            )
    header = ["run", "weight", "‖ΔW‖ / ‖W‖", "% in K (Gaussian)", "% in 2K (Gaussian)", "90 %; 99 % in"]
    header += [
        "% in 2K of step 1",
        "of a tenth of the steps",
        "|Δσ|: top; middle; bottom",
        "gone: top; middle; bottom",
    ]
    return "\n".join(markdown([*header, "accuracy with 0; K; 2K; all"], rows))


def _moved(layer: dict[str, Any], block: str, K: int) -> str:
    """The largest change of a singular value, over the numbers that the result keeps."""
    numbers, part = layer["kept"], blocks(min(layer["shape"]), K)[block]
    first, last = (layer["singular_values"][at] for at in (0, -1))
    moved = [abs(a - b) for i, a, b in zip(numbers, first, last, strict=True) if part.start <= i < part.stop]
    return f"{max(moved):.2f}" if moved else "-"


def _gone(layer: dict[str, Any], block: str, K: int) -> str:
    """Directions that left a block, left and right."""
    parts = [layer["turned"][side].get(block) for side in SIDES]
    return ", ".join(f"{part['gone'][-1]:.1f}" if part else "-" for part in parts)


def plot(runs: list[dict[str, Any]], file: Path) -> Path:
    """A row for each run of the first seed, of the last weight watched; in the last panel all of them."""
    runs = [run for run in runs if run["settings"]["seed"] == runs[0]["settings"]["seed"]]
    figure, axes = plt.subplots(len(runs), 5, figsize=(20, 3.3 * len(runs)), layout="constrained", squeeze=False)
    for row, run in zip(axes, runs, strict=True):
        _draw(row, run)
    return save(figure, file)


def _draw(axes: np.ndarray, run: dict[str, Any]) -> None:
    K, steps, (name, layer) = run["classes"], run["steps"], list(run["layers"].items())[-1]
    q = min(layer["shape"])
    values, parts = np.array(layer["singular_values"]), blocks(q, K)
    colors = dict(zip(BLOCKS, ("tab:red", "tab:grey", "tab:blue"), strict=True))
    for block in ("middle", "top", "bottom"):
        columns = [at for at, i in enumerate(layer["kept"]) if i in range(*parts[block].indices(q))]
        axes[0].plot(steps, values[:, columns], color=colors[block], linewidth=0.8)
    axes[0].set(ylabel=f"singular values of W, {name}", title=label(run["settings"]))
    increment = np.array(layer["increment"])
    axes[1].plot(steps[1:], increment[:, 2 * K :], color="tab:grey", linewidth=0.8)
    axes[1].plot(steps[1:], increment[:, K : 2 * K], color="tab:orange", linewidth=0.8)
    axes[1].plot(steps[1:], increment[:, :K], color="tab:red", linewidth=0.8)
    axes[1].set(ylabel="first 3K singular values of W(t) − W(0)", title="red: K, orange: K to 2K, grey: to 3K")
    for axis, side, n in zip(axes[2:4], ("right", "left"), reversed(layer["shape"]), strict=True):
        for block, part in layer["turned"][side].items():
            p = parts[block].stop - parts[block].start
            gone, largest = (np.array(part[key], dtype=float) for key in ("gone", "largest"))
            if p < n:  # or it is the whole space
                axis.plot(steps, gone / (p * (1 - p / n)), color=colors[block], label=f"{block} {p}")
            axis.plot(steps, np.sin(largest), color=colors[block], linewidth=0.8, linestyle=":")
        axis.set(ylabel="turned; 1: as two random subspaces", title=f"{side} vectors; dotted: sin of largest angle")
        axis.set_ylim(-0.03, 1.15)
        axis.legend(fontsize="small", loc="upper left")
    for other, found in run["layers"].items():
        (line,) = axes[4].plot(steps[1:], found["share_2K"], label=other)
        axes[4].plot(steps[1:], found["known"], color=line.get_color(), linestyle="--")
        axes[4].axhline(found["gaussian"]["share_2K"], color=line.get_color(), linestyle=":", linewidth=1)
    axes[4].set(ylabel="share of the squared increment in 2K", ylim=(0, 1.02))
    axes[4].set_title("solid: own; dashed: of the last, in those of t;\ndotted: Gaussian", fontsize="medium")
    axes[4].legend(fontsize="x-small")
    for axis in axes:
        axis.set_xscale("symlog", linthresh=1)
        axis.set(xlabel="step", xlim=(0, steps[-1]))


def main(arguments: list[str] | None = None) -> None:
    """Make the runs that are missing, each kept when it ends; print the table, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=Path)
    parser.add_argument("--data", default="", help="a folder with train.parquet and test.parquet, or another Hub id")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--plot", action="store_true", help="table and figure of what is there, no runs")
    options = parser.parse_args(arguments)
    file = options.output / "results" / f"{options.settings.stem}.json"
    runs = json.loads(file.read_text())["runs"] if file.exists() else []
    wanted = spanned(options.settings)
    for i, settings in enumerate(() if options.plot else wanted):
        if settings not in [run["settings"] for run in runs]:
            print(f"run {i + 1} of {len(wanted)}: {label(settings)}", flush=True)
            runs.append({"settings": settings, **measure(settings, options.data), **environment.record()})
            file.parent.mkdir(parents=True, exist_ok=True)
            draft = file.with_suffix(".tmp")
            lines = ",\n".join(json.dumps(run, allow_nan=False) for run in runs)
            draft.write_text(f'{{"runs": [\n{lines}\n]}}\n')
            os.replace(draft, file)
    found = [run for settings in wanted for run in runs if run["settings"] == settings]
    print(text(found))
    print(plot(found, options.output / "plots" / f"{options.settings.stem}.png"))


if __name__ == "__main__":
    main()
