"""What runs that reached a threshold or did not say about the d from which they do."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


ODD = 0.01
"""The probability that a run has the opposite of the outcome that its d calls for, such as by divergence."""
CELLS, WIDTHS = 8, 10
"""Parts of each gap between two d that were run, and widths of the transition, over which is summed."""


@dataclass(frozen=True)
class Curve:
    """The probability that a run reaches the threshold rises with ln d, from ε to 1 - ε, and is `probability` at d_p:

        P(d) = ε + (1 - 2ε) logistic((ln d - ln d_p) / s + logit(p')),    p' = (p - ε) / (1 - 2ε)

    Before the first run all ln d_p from `d_min` / 2 to 2 `d_max` and all ln s are equally likely, s from a quarter of
    the resolution to 1/2, where P rises from 10 % to 90 % over a factor of 9 in d.
    """

    probability: float
    d_min: int
    d_max: int
    resolution: float

    def quantiles(self, d: np.ndarray, success: np.ndarray, levels: list[float]) -> np.ndarray:
        """Of d_p given the runs, real numbers, as many as levels.

        Args:
            d: [runs]
            success: [runs], whether each reached the threshold.
        """
        tried, at = np.unique(d, return_inverse=True)
        successes, runs = np.bincount(at, success), np.bincount(at)
        edges = np.log(np.unique([self.d_min / 2, *tried, self.d_max, 2 * self.d_max]))
        ends = (1 - np.cos(np.linspace(0, np.pi, CELLS + 1))) / 2  # close near the runs, where the likelihood changes
        cells = np.append((edges[:-1, None] + np.diff(edges)[:, None] * ends[:-1]).ravel(), edges[-1])
        step, nodes = np.diff(cells), (cells[1:] + cells[:-1]) / 2
        P = self._probability(np.log(tried), nodes)
        likelihood = np.tensordot(successes, np.log(P), 1) + np.tensordot(runs - successes, np.log1p(-P), 1)
        mass = step * np.exp(likelihood - likelihood.max()).mean(1)
        below = np.concatenate([[0], np.cumsum(mass) / mass.sum()])
        return np.exp(np.interp(levels, below, cells))

    def _probability(self, x: np.ndarray, nodes: np.ndarray) -> np.ndarray:
        """[d, nodes, widths] for ln d and ln d_p."""
        p = self.probability
        odd = min(ODD, p / 4, (1 - p) / 4)
        inner = (p - odd) / (1 - 2 * odd)
        s = np.geomspace(min(self.resolution / 4, 0.1), 0.5, WIDTHS)
        z = (x[:, None, None] - nodes[:, None]) / s + math.log(inner / (1 - inner))
        return odd + (1 - 2 * odd) / (1 + np.exp(-np.clip(z, -40, 40)))
