"""What tests of reports look at: the axes of the figure that was drawn last."""

import pytest

from recipes.reports import figures


@pytest.fixture
def panels(monkeypatch):
    """After `plot`: the axes that it asked for, [rows, columns]."""
    drawn, original = [], figures.plt.subplots

    def subplots(*shape, **choices):
        figure, axes = original(*shape, **choices)
        drawn.append(axes)
        return figure, axes

    monkeypatch.setattr(figures.plt, "subplots", subplots)
    return lambda: drawn[-1]
