"""What all figures share: colours, markers, sizes, and a small file that is the same whenever it is drawn again."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from PIL import Image


COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F3C8D", "#666666")
"""Okabe and Ito 2008, which colour-blind readers tell apart, without yellow and black, and two more."""
MARKERS = "osD^vPX*"
GREY = "#888888"
DPI = 150
PALETTE = 128
"""Colours of a file."""
LARGEST = 1e6
"""Counts from here on have no room on an axis and are written as powers of ten."""

plt.rcParams.update(
    {
        "axes.grid": True,
        "axes.prop_cycle": plt.cycler(color=COLOURS),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 11.5,
        "figure.titlesize": 13,
        "font.size": 10.5,
        "grid.alpha": 0.3,
        "legend.fontsize": 9.5,
        "legend.framealpha": 0.9,
        "lines.markersize": 5.5,
    }
)


def panels(rows: int, columns: int, width: float = 5.2, height: float = 4.0, **choices: Any) -> tuple[Figure, Any]:
    """A figure and its axes, [rows, columns]; width and height of a panel in inches."""
    size = (columns * width, rows * height)
    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **choices)


def style(at: int) -> dict[str, str]:
    """Colour and marker of the line with this number."""
    return {"color": COLOURS[at % len(COLOURS)], "marker": MARKERS[at % len(MARKERS)]}


def band(axis: Axes, x: Iterable[float], mean: Any, deviation: Any, color: str) -> None:
    """One standard deviation to both sides; nothing where there is one seed."""
    axis.fill_between(x, mean - deviation, mean + deviation, color=color, alpha=0.15, linewidth=0)


def count(number: float, *_: Any) -> str:
    """44426 -> "44 426", with thin spaces; powers of ten from a million on."""
    if number >= LARGEST and f"{number:e}".startswith("1.000000"):
        return f"$10^{{{round(np.log10(number))}}}$"
    return f"{number:,.0f}".replace(",", "\N{THIN SPACE}") if number >= 1 else f"{number:g}"


def counted(axis: Axes, ticks: Iterable[float] = (), base: float = 10) -> None:
    """A logarithmic x axis whose ticks are whole numbers."""
    axis.set_xscale("log", base=base)
    if len(ticks := list(ticks)):
        axis.set_xticks(ticks)
    axis.xaxis.set_major_formatter(FuncFormatter(count))
    axis.xaxis.set_minor_formatter(NullFormatter())


def plain_ticks(axis: Axes, ticks: Iterable[float]) -> None:
    """A logarithmic x axis with these ticks, written as they are, and no others."""
    axis.set_xscale("log")
    axis.set_xticks(list(ticks), [f"{tick:g}" for tick in ticks])
    axis.set_xticks([], minor=True)


def sparse(values: Iterable[float], most: int = 6) -> list[float]:
    """At most so many of the values, from the smallest on and evenly chosen."""
    values = sorted(set(values))
    return values[:: -(-(len(values) - 1) // max(most - 1, 1)) or 1]


def headline(figure: Figure, words: str) -> None:
    """The question or the finding, above all panels."""
    figure.suptitle(words, x=0.01, ha="left", weight="bold")


def legend_below(figure: Figure, columns: int, axes: Iterable[Axes] | None = None) -> None:
    """One legend of what the panels show, each label once."""
    drawn = [zip(*axis.get_legend_handles_labels(), strict=True) for axis in (figure.axes if axes is None else axes)]
    handles = {label: handle for panel in drawn for handle, label in panel}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False)


def save(figure: Figure, file: Path) -> Path:
    """PNG with a palette, which takes a third of the bytes."""
    figure.canvas.draw()
    pixels = io.BytesIO()
    figure.savefig(pixels, format="png", dpi=DPI)
    plt.close(figure)
    image = Image.open(pixels).convert("RGB").quantize(PALETTE, dither=Image.Dither.NONE)
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, format="PNG", optimize=True)
    return file


def edges(places: Iterable[float]) -> np.ndarray:
    """Half-way between the neighbours of a grid on a logarithmic axis, and as far beyond its ends."""
    logs = np.log2(np.unique(list(places)))
    steps = np.diff(logs) if len(logs) > 1 else np.ones(1)
    around = np.concatenate([[logs[0] - steps[0]], logs, [logs[-1] + steps[-1]]])
    return 2 ** ((around[1:] + around[:-1]) / 2)
