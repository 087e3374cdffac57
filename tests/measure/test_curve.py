"""The quantiles of d_p given runs, against Bayes' rule by brute force."""

import math

import numpy as np
import pytest

from subspace_peft.measure.curve import Curve


def test_the_quantiles_are_those_of_a_fine_grid():
    """The grid has 2000 values of ln d_p, so that it knows the ends of every interval to 0.4 %."""
    curve = Curve(probability=0.7, d_min=10, d_max=1000, resolution=0.1)
    d, success = np.array([10, 20, 40, 80, 60, 70, 70, 60]), np.array([0, 0, 0, 1, 0, 1, 0, 1])
    x = np.linspace(math.log(5), math.log(2000), 2001)
    x = (x[1:] + x[:-1]) / 2
    s = np.geomspace(0.025, 0.5, 10)
    p = 0.01 + 0.98 / (1 + np.exp(-(np.log(d)[:, None, None] - x[:, None]) / s - math.log(0.69 / 0.29)))
    density = np.where(success[:, None, None], p, 1 - p).prod(0).sum(1)
    below = np.cumsum(density) / density.sum()
    for level in (0.025, 0.25, 0.5, 0.75, 0.975):
        (result,) = curve.quantiles(d, success, [level])
        assert result == pytest.approx(math.exp(np.interp(level, below, x)), rel=0.03)
