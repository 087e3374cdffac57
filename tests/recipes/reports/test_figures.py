"""Figures are small files, the same whenever they are drawn again, and those of the recipes are in that form."""

import numpy as np
import pytest
from PIL import Image

from recipes.reports import figures
from tests.recipes.files import RECIPES


def drawn(file):
    figure, ((axis,),) = figures.panels(1, 1)
    axis.plot([1, 10, 100], [0, 1, 4], label="a line", **figures.style(0))
    axis.imshow(np.random.default_rng(0).random((20, 20)), extent=(1, 100, 0, 4), aspect="auto", cmap="viridis")
    figures.counted(axis)
    figures.headline(figure, "What is shown?")
    figures.legend_below(figure, 1)
    return figures.save(figure, file)


def test_a_figure_has_a_palette_and_is_the_same_again(tmp_path):
    first, second = (drawn(tmp_path / "plots" / f"{name}.png") for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    with Image.open(first) as image:
        assert image.mode == "P"
        assert len(image.getcolors()) <= figures.PALETTE
        assert image.size == tuple(round(inches * figures.DPI) for inches in (5.2, 4.0))
    assert not figures.plt.get_fignums()


@pytest.mark.parametrize(
    "file", sorted(RECIPES.glob("*/plots/*.png")), ids=lambda file: f"{file.parts[-3]}/{file.stem}"
)
def test_the_figures_of_the_recipes_are_small(file):
    assert file.stat().st_size <= 150_000
    with Image.open(file) as image:
        assert image.mode == "P"


def test_whole_numbers_on_a_logarithmic_axis():
    assert [figures.count(number) for number in (0.5, 7, 44426, 10**6)] == [
        "0.5",
        "7",
        "44\N{THIN SPACE}426",
        "$10^{6}$",
    ]


@pytest.mark.parametrize("n", [1, 2, 6, 7, 13])
def test_ticks_are_few_and_evenly_chosen(n):
    ticks = figures.sparse(range(n))
    assert ticks[0] == 0
    assert len(ticks) <= 6
    assert len(set(np.diff(ticks))) <= 1


def test_a_column_lies_around_its_place():
    assert figures.edges([4, 1, 2]) == pytest.approx(np.sqrt([0.5, 2, 8, 32]))
    assert figures.edges([1, 16, 64]) == pytest.approx([0.25, 4, 32, 128])
    assert figures.edges([8]) == pytest.approx([32**0.5, 128**0.5])


def test_colours_and_markers_differ():
    looks = [tuple(figures.style(at).values()) for at in range(len(figures.COLOURS))]
    assert len(set(looks)) == len(looks)
