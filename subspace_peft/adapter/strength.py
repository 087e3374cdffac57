"""Strength: what the increments of an adapter are multiplied by, as diffusers asks of every layer, and in sums."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import isfinite

from peft import PeftConfig
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

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


def strength_of(model: nn.Module, adapter: str) -> float:
    """The scale of an adapter, which has no part that is saved whole.

    Raises:
        ValueError: if it has one, or differs from layer to layer.
    """
    strengths = set()
    for name, module in model.named_modules():
        if isinstance(module, Strength):
            strengths |= {coordinates.strength for coordinates in module.coordinates.get(adapter, {}).values()}
        elif isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
            raise ValueError(
                f"Adapters that save modules whole have no exact sum, {adapter!r} saves `{name}`; average their state "
                "dicts instead, or leave `modules_to_save` out."
            )
    if len(strengths) > 1:
        raise ValueError(
            f"An adapter must have one scale to be summed, {adapter!r} has {sorted(strengths)}; set one everywhere."
        )
    return strengths.pop()


def check_sources(adapters: Sequence[str], weights: Sequence[float], configs: Mapping[str, PeftConfig]) -> None:
    """Check what a weighted sum is made of.

    Raises:
        ValueError: if an adapter is not one of the model's, or a weight is no finite number.
    """
    if len(adapters) != len(weights) or not adapters:
        raise ValueError(
            "`adapters` must name at least one adapter and `weights` hold one number for each, got "
            f"{len(weights)} for {len(adapters)}; give as many."
        )
    if unknown := [adapter for adapter in adapters if adapter not in configs]:
        there = ", ".join(configs)
        raise ValueError(f"`adapters` must be adapters of the model, got {unknown[0]!r}; it has {there}.")
    for weight in weights:
        try:
            is_finite = isfinite(weight)
        except (TypeError, ValueError):
            is_finite = False
        if not is_finite:
            raise ValueError(f"`weights` must be finite numbers, got {weight!r}; give one for each adapter.")
