"""RecordingCallback: the steps at which a Trainer records something, and how a resumed training continues it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection

from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback


class RecordingCallback(TrainerCallback, ABC):
    """Records before the first step, then every epoch or n steps, and at given steps.

    Args:
        name: The label of the progress bar.
        every: "epoch", or a number of optimiser steps.
        initial: Whether to record the initial point, step 0, too.
        also: Further steps to record.
    """

    def __init__(self, name: str, every: str | int, initial: bool, also: frozenset[int] = frozenset()):
        if every != "epoch" and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
            raise ValueError(f"`every` must be 'epoch' or a number of steps of at least 1, got {every!r}.")
        self.name, self.every, self.initial, self.also = name, every, initial, also
        self._last, self._progress = None, None
        self._own: list[int] = []  # steps that the training under way has recorded
        self._batch_size = 0  # of the training under way

    @abstractmethod
    def recorded(self) -> list[int]:
        """The steps that are recorded already."""

    @abstractmethod
    def keep_until(self, step: int, own: Collection[int]) -> None:
        """Delete later steps, which the training records again; at step 0, refuse any that are not its own."""

    @abstractmethod
    def record(self, model: nn.Module, step: int) -> None:
        """Record one step; called on every process."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        step = state.global_step
        # a training that stopped within an epoch has recorded its last step as the end of one
        is_within = 0 < step < state.max_steps and bool((state.epoch or 0) % 1)
        is_within = is_within and self.every == "epoch" and step not in self.also
        if state.is_world_process_zero:
            self.keep_until(step - is_within, self.recorded() if step else self._own * self._begins_again(args, state))
        self._own, self._batch_size = [], state.train_batch_size or 0
        total = state.num_train_epochs if self.every == "epoch" else state.max_steps // self.every
        self._last = None
        self._progress = tqdm(
            desc=self.name,
            unit="sample",
            total=int(total) + self.initial,
            initial=len(self.recorded()) if state.is_world_process_zero else 0,
            disable=args.disable_tqdm or not state.is_world_process_zero,
        )
        if self.initial and state.global_step == 0:
            self._record(model, state)

    def _begins_again(self, args, state) -> bool:
        """Whether Trainer begins this training once more, with smaller batches, as memory was short."""
        return args.auto_find_batch_size and (state.train_batch_size or 0) < self._batch_size

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        if self.every == "epoch":
            self._record(model, state)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        step = state.global_step
        if (self.every != "epoch" and step % self.every == 0) or step in self.also:
            self._record(model, state)

    def on_train_end(self, args, state, control, **kwargs):
        self._own, self._batch_size = [], 0
        self._progress.close()

    def _record(self, model: nn.Module, state) -> None:
        if state.global_step == self._last:  # a step in `also` may be the last of an epoch
            return
        self._last = state.global_step
        self._own.append(state.global_step)
        self.record(model, state.global_step)
        self._progress.update()
