"""The tables and the figure of projections.py."""

from pathlib import Path
from typing import Any

from recipes.reports.figures import GREY, count, counted, headline, legend_below, panels, save, style
from recipes.reports.labels import name
from recipes.reports.tables import markdown, span


COMPARED = {
    "sparse": "sparse",
    "fastjl": "FastJL",
    "fastfood": "Fastfood",
    "dense": "dense",
    "peft unilora": "PEFT's Uni-LoRA",
    "peft vera": "PEFT's VeRA",
    "peft fourierft": "PEFT's FourierFT",
}
"""What the figure compares, in words."""
TARGET = 20
FASTER = "times_faster_than_butterfly"
BRIEF = 10  # milliseconds below which a table has two decimals
Record = dict[str, Any]


def text(size: str, result: Record) -> str:
    """All numbers of one size."""
    rows = []
    for method, r in result["methods"].items():
        cells = [method, f"{r['ms']:.3g}", f"{r['apply_ms']:.3g} / {r['adjoint_ms']:.3g}"]
        cells += [f"{r['autograd_ms']:.3g}" if "autograd_ms" in r else "", f"{r['cpu_ms']:.3g}", r.get("of_copy", "")]
        rows.append([*cells, r.get(FASTER, ""), r["state_bytes_per_entry"]])
    header = ["method", "ms", "apply / adjoint", "through autograd", "CPU ms", "of copy", "than butterfly"]
    title = f"\n{size}: D = {result['D']:,}, d = {result['d']:,}; load {result['load'][0]:.1f}\n"
    return "\n".join([title, *markdown([*header, "bytes an entry"], rows)])


def summary(sizes: dict[str, Record]) -> str:
    """Milliseconds, and times faster than the butterfly, of all methods at all sizes."""
    rows = []
    for method in dict.fromkeys(method for result in sizes.values() for method in result["methods"]):
        made = [result["methods"].get(method) for result in sizes.values()]
        state = [r["state_bytes_per_entry"] for r in made if r]
        rows.append([method, *map(_cell, made), span(*(f"{each(state):.1f}" for each in (min, max)))])
    names = [f"{_named(size)}: {result['D']:,}; {result['d']:,}" for size, result in sizes.items()]
    return "\n".join(markdown(["ms (times faster); D; d", *names, "bytes of state an entry"], rows))


def _named(size: str) -> str:
    network, *rest = size.split(" ", 1)
    return " ".join([name(network), *rest])


def _cell(result: Record | None) -> str:
    if result is None:
        return "-"
    ms = f"{result['ms']:.2f}" if result["ms"] < BRIEF else f"{result['ms']:.0f}"
    return f"{ms} ({result[FASTER]:.1f})" if result[FASTER] > 1 else ms


def plot(sizes: dict[str, Record], file: Path) -> Path:
    """How many times faster than the butterfly each method is over the tensors of each network; a dot each."""
    networks = {size: result for size, result in sizes.items() if " " not in size}
    shown = [method for method in COMPARED if any(method in each["methods"] for each in networks.values())]
    figure, ((axis,),) = panels(1, 1, width=8, height=4)
    for at, (size, result) in enumerate(networks.items()):
        faster = [(result["methods"].get(method, {}).get(FASTER), place) for place, method in enumerate(shown)]
        values, places = [each for each, _ in faster if each], [place for each, place in faster if each]
        axis.plot(values, places, linestyle="", label=f"{name(size)}, D = {count(result['D'])}", **style(at))
    axis.axvline(TARGET, color=GREY, linestyle="--", label="target")
    axis.set_yticks(range(len(shown)), [COMPARED[method] for method in shown])
    axis.set_ylim(len(shown) - 0.5, -0.5)
    axis.set_xlabel("times faster than a butterfly Fastfood")
    counted(axis, (2, 5, 10, 20, 50, 100))
    headline(figure, "How fast are P θ_d and its adjoint?")
    legend_below(figure, columns=3)
    return save(figure, file)
