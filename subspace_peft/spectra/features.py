"""ClassFeatures: how much features are compressed within classes and separated between them (Qu 2023)."""

from __future__ import annotations

import torch
from torch import Tensor


class ClassFeatures:
    """Means and spreads of the features z of K classes, in one pass over any batches, in float64.

    For each class it holds the number n_k, the mean z_k and the sum of |z_i - z_k|^2, merged batch by batch (Chan et
    al. 1979), so that features far from zero lose no digits. The memory is that of K vectors.
    """

    def __init__(self) -> None:
        self._rows: dict[int, int] = {}  # class -> row
        self._counts = self._squares = self._means = None

    @torch.no_grad()
    def add(self, features: Tensor, labels: Tensor) -> None:
        """Add one batch.

        Args:
            features: [B, ...]
            labels: integers [B]

        Raises:
            ValueError: if the shapes do not fit, or a feature is not finite.
        """
        if labels.ndim != 1 or labels.is_floating_point() or features.ndim < 2 or len(features) != len(labels):
            raise ValueError(
                "Features must be [B, ...] and labels B integers, one for each sample, got "
                f"{list(features.shape)} and {labels.dtype} {list(labels.shape)}; pass `read`, which makes features "
                "of what a layer returns."
            )
        features = features.cpu() if features.device.type == "mps" else features  # mps has no float64
        z = features.detach().flatten(1).double()
        if not z.isfinite().all():
            raise ValueError("Features must be finite, some of this batch are not; look at the layers before.")
        classes, inverse, n = labels.to(z.device).unique(return_inverse=True, return_counts=True)
        rows = self._rows_of(classes.tolist(), z)
        means = z.new_zeros(len(classes), z.shape[1]).index_add_(0, inverse, z) / n[:, None]
        squares = z.new_zeros(len(classes)).index_add_(0, inverse, (z - means[inverse]).square().sum(1))
        total, difference = self._counts[rows] + n, means - self._means[rows]
        self._squares[rows] += squares + difference.square().sum(1) * self._counts[rows] * n / total
        self._means[rows] += difference * (n / total)[:, None]
        self._counts[rows] = total

    def _rows_of(self, classes: list[int], z: Tensor) -> Tensor:
        """The rows of these classes; those of new classes are added."""
        if self._means is None:
            self._means, self._squares, self._counts = z.new_zeros(0, z.shape[1]), z.new_zeros(0), z.new_zeros(0)
        if z.shape[1] != self._means.shape[1]:
            raise ValueError(
                f"Features must be of one size in all batches, got {z.shape[1]} after {self._means.shape[1]}; pass "
                "`read`, which pools the dimension that varies."
            )
        new = [k for k in classes if k not in self._rows]
        self._rows |= {k: len(self._rows) + i for i, k in enumerate(new)}
        self._means = torch.cat([self._means, z.new_zeros(len(new), z.shape[1])])
        self._squares, self._counts = (torch.cat([t, z.new_zeros(len(new))]) for t in (self._squares, self._counts))
        return torch.tensor([self._rows[k] for k in classes], device=z.device)

    @property
    def classes(self) -> list[int]:
        """The classes, ascending: K, in the order of all other results."""
        return sorted(self._rows)

    def _sorted(self, tensor: Tensor) -> Tensor:
        return tensor[[self._rows[k] for k in self.classes]]

    @property
    def counts(self) -> Tensor:
        """n_k: [K]"""
        self._check()
        return self._sorted(self._counts).long()

    @property
    def means(self) -> Tensor:
        """z_k: [K, d]"""
        self._check()
        return self._sorted(self._means)

    @property
    def centred_means(self) -> Tensor:
        """mu_k = z_k - z_G, z_G the mean of the class means: [K, d]"""
        return self.means - self.means.mean(0)

    @property
    def within(self) -> float:
        """tr Sigma_W = 1/K sum_k 1/n_k sum_i |z_ki - z_k|^2.

        For balanced classes this is the 1/(nK) sum_k sum_i of Qu's slides; otherwise all classes count alike, as they
        do in Sigma_B.
        """
        self._check()
        return (self._squares / self._counts).mean().item()

    @property
    def between(self) -> float:
        """tr Sigma_B = 1/K sum_k |mu_k|^2."""
        return self.centred_means.square().sum(1).mean().item()

    @property
    def compression(self) -> float:
        """D = tr Sigma_W / tr Sigma_B: 0 if each class is one point, inf or NaN if all classes have the same mean."""
        within, between = self.within, self.between
        return within / between if between else (torch.inf if within else torch.nan)

    @property
    def separation(self) -> float:
        """S = 1 - max_{k != k'} |<mu_k, mu_k'>| / (|mu_k| |mu_k'|).

        The maximum is 1 - 1/(K - 1), at the corners of a simplex: the mu_k sum to zero, so the longest one has an
        absolute cosine of at least 1/(K - 1) with another. S is 0 for two classes, and NaN if some mu_k is zero.
        """
        mu = self.centred_means
        mu = mu / mu.norm(dim=1, keepdim=True)
        cosines = (mu @ mu.mT).abs().fill_diagonal_(0)
        return (1 - cosines.max()).item()

    def _check(self) -> None:
        if len(self._rows) < 2:
            raise ValueError(f"Features must be of 2 classes or more, got {self.classes}; add batches of others.")
