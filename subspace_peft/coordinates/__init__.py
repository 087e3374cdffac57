"""Coordinates: what theta is, the weights themselves or their factors."""

from .base import Coordinates
from .low_rank import LowRank
from .weight import Weight


COORDINATES: dict[str, type[Coordinates]] = {"weight": Weight, "low_rank": LowRank}
"""The classes by the name that a config gives; the only list."""

__all__ = ["COORDINATES", "Coordinates", "LowRank", "Weight"]
