"""Strength: what the increments of an adapter are multiplied by, as diffusers asks of every layer, and in sums."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import isfinite

from ..coordinates import Coordinates


class Strength:
    """What a SubspaceLayer adds to `BaseTunerLayer` for that: a scale that is not saved, 1 for a new adapter.

    It multiplies P theta_d, or of low-rank coordinates the product of the factors. Batch-norm statistics stay.
    """

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply the increments of this adapter by `scale`; nothing if it does not move this module.

        Raises:
            ValueError: if the layer is merged, or another scale than 1 is given to an adapter that replaces a weight.
        """
        for coordinates in self._own(adapter):
            self._strengthen(coordinates, scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the present scale of each active adapter by `scale`; raises as `set_scale` does."""
        for coordinates in self._active():
            self._strengthen(coordinates, coordinates.strength * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scale of each active adapter by `scale`, or set it to 1; raises as `set_scale` does."""
        for coordinates in self._active():
            self._strengthen(coordinates, 1.0 if scale is None else coordinates.strength / scale)

    def _active(self) -> Iterator[Coordinates]:
        return (coordinates for adapter in self.active_adapters for coordinates in self._own(adapter))

    def _own(self, adapter: str) -> list[Coordinates]:
        """The coordinates of this adapter, without those that a layer with the same tensor scales."""
        moved = self.coordinates.get(adapter, {})
        return [coordinates for path, coordinates in moved.items() if path not in self.merged_elsewhere[adapter]]

    def _strengthen(self, coordinates: Coordinates, strength: float) -> None:
        if self.merged and strength != coordinates.strength:
            raise ValueError(
                f"An adapter must be unmerged to be scaled, `{coordinates.name}` is merged; call unmerge_adapter()."
            )
        if coordinates.replaces and strength != 1:
            raise ValueError(
                f"An adapter that replaces a weight has no increment to scale, got {strength} for "
                f"`{coordinates.name}`; leave its scale at 1."
            )
        coordinates.strength = strength
        self.reads.clear()


def one_strength(adapter: str, coordinates: Iterable[Coordinates]) -> float:
    """The scale of an adapter with these coordinates.

    Raises:
        ValueError: if it differs from layer to layer.
    """
    strengths = {each.strength for each in coordinates}
    if len(strengths) > 1:
        raise ValueError(
            f"An adapter must have one scale to be summed, {adapter!r} has {sorted(strengths)}; set one everywhere."
        )
    return strengths.pop()


def check_weights(adapters: Sequence[str], weights: Sequence[float]) -> None:
    """Check the weights of a sum.

    Raises:
        ValueError: if they are not one finite number for each adapter.
    """
    if len(adapters) != len(weights) or not adapters:
        raise ValueError(
            "`adapters` must name at least one adapter and `weights` hold one number for each, got "
            f"{len(weights)} for {len(adapters)}; give as many."
        )
    for weight in weights:
        try:
            is_finite = isfinite(weight)
        except (TypeError, ValueError):
            is_finite = False
        if not is_finite:
            raise ValueError(f"`weights` must be finite numbers, got {weight!r}; give one for each adapter.")
