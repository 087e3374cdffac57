"""Trajectories: weights sampled along a training, and the subspaces that they span."""

from .callback import TrajectoryCallback
from .trajectory import Trajectory, coefficients, reconstruct


__all__ = ["Trajectory", "TrajectoryCallback", "coefficients", "reconstruct"]
