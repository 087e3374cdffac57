"""TrajectoryCallback: records a trajectory while transformers' Trainer trains."""

from __future__ import annotations

import os

from torch import nn

from ..recording import RecordingCallback
from .trajectory import Trajectory


class TrajectoryCallback(RecordingCallback):
    """Records a trajectory while transformers' Trainer trains: before the first step, then every epoch or n steps.

    A training resumed from a checkpoint goes on with the samples up to that step, and later ones are deleted: it makes
    them again. A training from the start wants a folder without samples.

    Args:
        folder: For the samples, as in Trajectory.
        every: "epoch", or a number of optimiser steps.
        initial: Record the initial point, step 0, too.

    Raises:
        ValueError: when training starts at step 0 and the folder holds samples.
    """

    def __init__(self, folder: str | os.PathLike, every: str | int = "epoch", initial: bool = True):
        super().__init__("trajectory", every, initial)
        self.trajectory = Trajectory(folder)

    def recorded(self) -> list[int]:
        return list(self.trajectory._files())

    def keep_until(self, step: int) -> None:
        files = self.trajectory._files()
        if files and step == 0:
            raise ValueError(
                f"A training from the start must be recorded in a folder without samples, "
                f"{str(self.trajectory.folder)!r} holds {len(files)}; resume that training with "
                "trainer.train(resume_from_checkpoint=True), choose another folder, or delete them."
            )
        for later in (path for other, path in files.items() if other > step):
            later.unlink()

    def record(self, model: nn.Module, step: int) -> None:
        self.trajectory.add(model, step)
