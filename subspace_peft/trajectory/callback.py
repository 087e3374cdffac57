"""TrajectoryCallback: records a trajectory while transformers' Trainer trains."""

from __future__ import annotations

import os
from collections.abc import Collection

from torch import nn

from ..recording import RecordingCallback
from .trajectory import Trajectory


class TrajectoryCallback(RecordingCallback):
    """Records a trajectory while transformers' Trainer trains: before the first step, then every epoch or n steps.

    A training that resumes from a checkpoint keeps the samples up to the checkpoint's step and deletes later ones,
    which it records again. A training from the start requires a folder without samples.

    Args:
        folder: For the samples, as in Trajectory.
        every: "epoch", or a number of optimiser steps.
        initial: Whether to record the initial point, step 0, too.

    Raises:
        ValueError: when training starts at step 0 and the folder holds samples.
    """

    def __init__(self, folder: str | os.PathLike, every: str | int = "epoch", initial: bool = True):
        super().__init__("trajectory", every, initial)
        self.trajectory = Trajectory(folder)

    def recorded(self) -> list[int]:
        return list(self.trajectory.files())

    def keep_until(self, step: int, own: Collection[int]) -> None:
        files = self.trajectory.files()
        if (others := files.keys() - own) and step == 0:
            raise ValueError(
                f"A training from the start must be recorded in a folder without samples, "
                f"{str(self.trajectory.folder)!r} holds {len(others)}; resume that training with "
                "trainer.train(resume_from_checkpoint=True), choose another folder, or delete them."
            )
        for later in (path for other, path in files.items() if other > step):
            later.unlink()

    def record(self, model: nn.Module, step: int) -> None:
        self.trajectory.add(model, step)
