"""The table and the figure of what training changes in the weights."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from recipes.lab.results import Results
from recipes.lab.settings import PlainSettings
from recipes.reports.dimension import markdown
from recipes.reports.figures import save
from subspace_peft.spectra import BLOCKS, SIDES, blocks


def label(settings: PlainSettings) -> str:
    words = [settings["model"], settings["activation"]] if settings["model"] == "mlp" else [settings["model"]]
    return f"{', '.join(words)}, {settings['start']} start, {settings['optimizer']}, seed {settings['seed']}"


def text(runs: list[PlainSettings], results: Results) -> str:
    """The end of each training: a line for each watched weight. Of top, middle and bottom: see `turned`, `_moved`."""
    runs = results.records(runs)
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


def plot(runs: list[PlainSettings], results: Results, file: Path) -> Path:
    """A row for each run of the first seed, of the last weight watched; in the last panel all of them."""
    runs = results.records(runs)
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
