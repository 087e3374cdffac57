"""The distribution of d_p given the runs that reached the threshold and those that did not."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


ODD = 0.01
"""ε: the probability that a run has the opposite of the outcome expected at its d, for example by divergence."""
CELLS, WIDTHS = 8, 10
"""Cells between neighbouring d that were run, and widths of the transition: the grid of the sums in Bayes' rule."""


@dataclass(frozen=True)
class Curve:
    """The probability of success by d, and Bayes' rule for d_p.

    The probability that a run reaches the threshold rises with ln d, from ε to 1 - ε, and equals `probability` at d_p:

        P(d) = ε + (1 - 2ε) logistic((ln d - ln d_p) / s + logit(p')),    p' = (p - ε) / (1 - 2ε)

    The prior is flat in ln d_p, from `d_min` / 2 to 2 `d_max`, and in ln s, from a quarter of the resolution to 1/2.
    With s = 1/2, P rises from 10 % to 90 % while d grows ninefold.
    """

    probability: float
    d_min: int
    d_max: int
    resolution: float

    def quantiles(self, d: np.ndarray, success: np.ndarray, levels: list[float]) -> np.ndarray:
        """Quantiles of d_p given the runs, as real numbers [levels].

        Args:
            d: [runs]
            success: [runs], whether each run reached the threshold.
        """
        cells, density = self._posterior(d, success)
        mass = np.diff(cells) * density.mean(1)
        below = np.concatenate([[0], np.cumsum(mass) / mass.sum()])
        return np.exp(np.interp(levels, below, cells))

    def chances(self, d: np.ndarray, success: np.ndarray, at: list[int]) -> np.ndarray:
        """The probability that a further run at each d of `at` succeeds, given the runs [at]."""
        cells, density = self._posterior(d, success)
        mass = np.diff(cells)[:, None] * density
        return np.tensordot(self._probability(np.log(at), _centres(cells)), mass, 2) / mass.sum()

    def _posterior(self, d: np.ndarray, success: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Edges of cells of ln d_p [cells + 1], and the density in each for each width s, up to a factor."""
        tried, at = np.unique(d, return_inverse=True)
        successes, runs = np.bincount(at, success), np.bincount(at)
        edges = np.log(np.unique([self.d_min / 2, *tried, self.d_max, 2 * self.d_max]))
        ends = (1 - np.cos(np.linspace(0, np.pi, CELLS + 1))) / 2  # close near the runs, where the likelihood changes
        cells = np.append((edges[:-1, None] + np.diff(edges)[:, None] * ends[:-1]).ravel(), edges[-1])
        P = self._probability(np.log(tried), _centres(cells))
        likelihood = np.tensordot(successes, np.log(P), 1) + np.tensordot(runs - successes, np.log1p(-P), 1)
        return cells, np.exp(likelihood - likelihood.max())

    def _probability(self, x: np.ndarray, centres: np.ndarray) -> np.ndarray:
        """P at ln d = x, for each ln d_p and each width s: [x, centres, widths]."""
        p = self.probability
        odd = min(ODD, p / 4, (1 - p) / 4)
        inner = (p - odd) / (1 - 2 * odd)
        s = np.geomspace(min(self.resolution / 4, 0.1), 0.5, WIDTHS)
        z = (x[:, None, None] - centres[:, None]) / s + math.log(inner / (1 - inner))
        return odd + (1 - 2 * odd) / (1 + np.exp(-np.clip(z, -40, 40)))


def _centres(cells: np.ndarray) -> np.ndarray:
    return (cells[1:] + cells[:-1]) / 2
