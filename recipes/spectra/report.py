"""The tables and the figure of what training changes in the weights."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from recipes.lab.results import Results
from recipes.lab.settings import PlainSettings
from recipes.reports.figures import COLOURS, GREY, headline, legend_below, panels, save, style
from recipes.reports.labels import labels, name
from recipes.reports.tables import joined, markdown, without_empty
from subspace_peft.spectra import BANDS, SIDES, bands


BAND_COLOURS = {"middle": GREY, "top": COLOURS[1], "bottom": COLOURS[0]}


def label(settings: PlainSettings) -> str:
    """The network, its start and its optimiser in words."""
    network = {"relu": "MLP", "linear": "MLP without ReLU"}[settings["activation"]]
    if settings["model"] != "mlp":
        network = name(settings["model"].rpartition("/")[-1])
    return f"{network}, {settings['start']} start, {name(settings['optimizer'])}"


def _named(runs: list[PlainSettings], results: Results) -> list[tuple[str, dict[str, Any]]]:
    """Label and result of each run that has one."""
    names = labels(runs, label, besides=())
    return [(names[run.name], record) for run in runs if (record := results.load(run))]


def parts(runs: list[PlainSettings], results: Results) -> dict[str, str]:
    """The tables "increment" and "weight": what is added at the end of training, and what becomes of the weight."""
    increment, weight = [], []
    for words, record in _named(runs, results):
        tenth = next(at for at, step in enumerate(record["steps"][1:]) if 10 * step >= record["steps"][-1])
        for at, (layer_name, layer) in enumerate(record["layers"].items()):
            first = [words if at == 0 else "", f"{layer_name}, {'x'.join(map(str, layer['shape']))}"]
            increment.append(first + _increment(layer, tenth) + _accuracies(layer, record["accuracy"]))
            changed = ("; ".join(part(layer, band, record["classes"]) for band in BANDS) for part in (_moved, _gone))
            weight.append([*first, f"{layer['change'][-1]:.2f}", *changed])
    header = ["training", "weight", "share of ‖ΔW‖² in K, 2K directions, % (Gaussian)", "directions for 90; 99 %"]
    header += ["in the 2K of step 1; of a tenth of the steps, %", "accuracy with 0; K; 2K; all of ΔW, %"]
    moved = ["training", "weight", "‖ΔW‖ / ‖W‖", "largest change of a singular value: first K; middle; last K"]
    moved += ["directions gone from the first K; middle; last K, left and right"]
    return {"increment": "\n".join(markdown(header, increment)), "weight": "\n".join(without_empty(moved, weight))}


def text(runs: list[PlainSettings], results: Results) -> str:
    """The end of each training: a line for each watched weight."""
    return joined(parts(runs, results))


def _increment(layer: dict[str, Any], tenth: int) -> list[str]:
    shares = [f"{100 * layer[key][-1]:.1f} ({100 * layer['gaussian'][key]:.0f})" for key in layer["gaussian"]]
    needed = [str(layer["directions"][level]) for level in ("90%", "99%")]
    return [", ".join(shares), "; ".join(needed), "; ".join(f"{100 * layer['known'][at]:.0f}" for at in (0, tenth))]


def _accuracies(layer: dict[str, Any], whole: float) -> list[str]:
    kept = [layer["accuracy"][str(n)] for n in (0, layer["directions"]["K"], layer["directions"]["2K"])]
    return ["; ".join(f"{100 * each:.1f}" for each in [*kept, whole])]


def _moved(layer: dict[str, Any], band: str, K: int) -> str:
    """The largest change of a singular value, over the numbers that the result keeps."""
    numbers, part = layer["kept"], bands(min(layer["shape"]), K)[band]
    first, last = (layer["singular_values"][at] for at in (0, -1))
    moved = [abs(a - b) for i, a, b in zip(numbers, first, last, strict=True) if part.start <= i < part.stop]
    return f"{max(moved):.2f}" if moved else "-"


def _gone(layer: dict[str, Any], band: str, K: int) -> str:
    """Directions that left a band, left and right."""
    turned = [layer["turned"][side].get(band) for side in SIDES]
    return ", ".join(f"{part['gone'][-1]:.1f}" if part else "-" for part in turned)


def plot(runs: list[PlainSettings], results: Results, file: Path) -> Path:
    """Singular values of the last weight watched, for the first run and one by Adam; what holds the increments."""
    named = _named(runs, results)
    named = [each for each in named if each[1]["settings"]["seed"] == named[0][1]["settings"]["seed"]]
    other = [each for each in named if each[1]["settings"]["optimizer"] != named[0][1]["settings"]["optimizer"]]
    shown, K = [named[0], *other[:1]], named[0][1]["classes"]
    rows, columns = (2, 2) if len(shown) == 2 else (1, 3)
    figure, axes = panels(rows, columns, width=11 / columns, height=3.9)
    places = list(axes.flat)
    for axis, (words, record) in zip(places, shown, strict=False):
        _draw_values(axis, record)
        axis.set_title(f"The last weight: {words}" if rows > 1 else "Singular values of the last weight")
    _draw_shares(places[-2], named)
    _draw_known(places[-1], named)
    if len(named) > 1:
        legend_below(figure, 2, places[-1:])
    task = name(named[0][1]["settings"]["dataset"])
    headline(figure, f"Does training move few directions of a weight? {task}, {K} classes")
    return save(figure, file)


def _draw_values(axis: Axes, record: dict[str, Any]) -> None:
    """Those of the last weight watched, with a colour for the first and last K."""
    K, layer = record["classes"], list(record["layers"].values())[-1]
    q, values = min(layer["shape"]), np.array(layer["singular_values"])
    words = {"top": f"the first {K}", "middle": f"some of the {q - 2 * K} between", "bottom": f"the last {K}"}
    for band, color in BAND_COLOURS.items():
        columns = [at for at, i in enumerate(layer["kept"]) if i in range(*bands(q, K)[band].indices(q))]
        if columns:
            lines = axis.plot(record["steps"], values[:, columns], color=color, linewidth=0.9)
            lines[0].set_label(words[band])
    _steps(axis, record)
    axis.set_ylabel("singular value")
    axis.legend(loc="upper left")


def _draw_shares(axis: Axes, named: list[tuple[str, dict[str, Any]]]) -> None:
    """By weight, from the first to the last one watched."""
    for at, (words, record) in enumerate(named):
        layers = list(record["layers"].values())
        axis.plot([100 * layer["share_2K"][-1] for layer in layers], label=words, **style(at))
    gaussian = [100 * layer["gaussian"]["share_2K"] for layer in layers]
    axis.plot(gaussian, "k:", label="a random matrix")
    axis.annotate("a random matrix", (0, gaussian[0]), xytext=(4, 5), textcoords="offset points")
    watched = ["first", *["middle"] * (len(layers) - 2), "last"][-len(layers) :]
    axis.set_xticks(range(len(layers)), watched)
    n = 2 * named[0][1]["classes"]
    axis.set(ylim=(0, 104), xlabel="weights watched", ylabel=f"share of ‖ΔW‖² in {n} directions, %")
    axis.set_title("Is the change low-dimensional?")
    axis.margins(x=0.12)


def _draw_known(axis: Axes, named: list[tuple[str, dict[str, Any]]]) -> None:
    """How early the last watched weight has the directions of its whole change."""
    for at, (words, record) in enumerate(named):
        layer = list(record["layers"].values())[-1]
        axis.plot(record["steps"][1:], 100 * np.array(layer["known"]), label=words, color=style(at)["color"])
    _steps(axis, named[0][1])
    n = 2 * named[0][1]["classes"]
    axis.set(ylim=(0, 104), ylabel=f"share of ‖ΔW‖² in {n} of this step, %")
    axis.set_title("Are its directions there early?")


def _steps(axis: Axes, record: dict[str, Any]) -> None:
    axis.set_xscale("symlog", linthresh=1)
    axis.set(xlabel="steps of training", xlim=(0, record["steps"][-1]))
    axis.xaxis.set_major_formatter("{x:g}")
