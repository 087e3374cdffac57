"""SpectraCallback: records spectra while transformers' Trainer trains."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from ..recording import RecordingCallback
from .record import Spectra


class SpectraCallback(RecordingCallback):
    """Records `Spectra` while transformers' Trainer trains: before the first step, then every epoch or n steps.

    The reference step is always recorded. If `spectra` has a folder, a training that resumes from a checkpoint keeps
    the steps up to the checkpoint's and records later ones again.

    Args:
        spectra: The record, which says what is recorded and where.
        every: "epoch", or a number of optimiser steps.
        initial: Whether to record the initial point, step 0, too.

    Raises:
        ValueError: if the reference would not be recorded, and when training starts at step 0 but steps are already
            recorded.
    """

    def __init__(self, spectra: Spectra, every: str | int = "epoch", initial: bool = True):
        if not isinstance(spectra, Spectra):
            raise ValueError(f"`spectra` must be a Spectra, got {spectra!r}; make one: Spectra(rank=10, folder=...).")
        if spectra.reference == 0 and not initial and not len(spectra):
            raise ValueError(
                "The reference must be recorded, `reference` is 0 and `initial` False; set `initial=True`."
            )
        super().__init__("spectra", every, initial, frozenset({spectra.reference} - {None, 0}))
        self.spectra = spectra

    def recorded(self) -> list[int]:
        return self.spectra.steps

    def keep_until(self, step: int, own: Collection[int]) -> None:
        if (others := set(self.recorded()) - set(own)) and step == 0:
            raise ValueError(
                f"A training from the start must be recorded in an empty Spectra, this one holds {len(others)} "
                f"steps (folder: {self.spectra.folder}); resume that training with "
                "trainer.train(resume_from_checkpoint=True), or use a new Spectra and another folder."
            )
        self.spectra.keep_until(step)

    def record(self, model: nn.Module, step: int) -> None:
        self.spectra.add(model, step)
