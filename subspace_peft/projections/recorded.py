"""Recorded: what others see of P, which a cache may hold.

Graphs of torch.compile, torch.export and torch.jit.trace have what the seed determines as constants. Selective
checkpoints, which count operations, see nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import wraps
from itertools import count
from threading import Lock
from typing import Any

import torch
from torch.utils import checkpoint
from torch.utils._python_dispatch import (
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
    _pop_mode,
    _push_mode,
)


SELECTIVE = tuple(
    getattr(checkpoint, name)
    for name in ("_CachingTorchDispatchMode", "_CachedTorchDispatchMode")
    if hasattr(checkpoint, name)
)
"""The modes by which a selective checkpoint counts operations, and saves results, in forward and in backward."""

_marks = map(str, count())  # strings, as graphs guard on their values
_drawing = 0  # how many blocks of `unrecorded` run; several threads may draw at once
_lock = Lock()


def is_recorded() -> bool:
    """Whether torch.compile or torch.jit.trace records the operations.

    Neither records an autograd.Function with a jvp, or one that shares a constant with another, but both can record
    what it does.
    """
    return not _drawing and (torch.compiler.is_compiling() or torch.jit.is_tracing())


def is_transformed() -> bool:
    """Whether the operations are recorded, or torch.func transforms them, one by one."""
    return is_recorded() or torch._C._are_functorch_transforms_active()


@contextmanager
def unrecorded():
    """Make constants of a graph, which cannot record how the seed makes them.

    Tensors made in inference mode could not be used in training later, and those of torch.export have no values.
    """
    without_modes = _disable_current_modes if torch.compiler.is_compiling() else nullcontext
    state = torch._C._get_tracing_state()
    if state is not None:
        torch._C._set_tracing_state(None)
    _draw(1)
    try:
        with torch.inference_mode(False), torch.no_grad(), without_modes():
            yield
    finally:
        _draw(-1)
        if state is not None:
            torch._C._set_tracing_state(state)


def uncounted(function: Callable) -> Callable:
    """Hide from selective checkpoints how P is applied.

    They expect as many operations in backward as in forward, where a cache may hold P z by then, and that nothing
    writes to a result.
    """

    @wraps(function)
    def call(*args, **kwargs):
        if is_recorded() or not torch._C._len_torch_dispatch_stack():
            return function(*args, **kwargs)
        with _uncounted():
            return function(*args, **kwargs)

    return call


@contextmanager
def _uncounted():
    modes = _get_current_dispatch_mode_stack()
    others = [mode for mode in modes if not isinstance(mode, SELECTIVE)]
    if len(others) == len(modes):
        yield
        return
    _replace(modes, others)
    try:
        yield
    finally:
        _replace(others, modes)


def _replace(modes: list, others: list) -> None:
    for _ in modes:
        _pop_mode()
    for mode in others:
        _push_mode(mode)


def _draw(blocks: int) -> None:
    global _drawing
    with _lock:
        _drawing += blocks


class Redrawn(ABC):
    """What the seed determines on each device: drawn when it is needed, held, and left out of pickles and copies.

    What torch.compile records has it as a constant. A graph guards on no cache then, which other calls fill and empty,
    but on `_mark`, since another object in the same place may hold something else.
    """

    def __init__(self):
        self._drawn: dict[torch.device, Any] = {}
        self._mark = next(_marks)

    def state(self, device: torch.device) -> Any:
        """What was drawn, on `device`."""
        return self._constant(device, self._mark) if torch.compiler.is_compiling() else self._held(device)

    @torch.compiler.assume_constant_result
    def _constant(self, device: torch.device, mark: str) -> Any:
        return self._held(device)

    @abstractmethod
    def _held(self, device: torch.device) -> Any:
        """What was drawn, or is drawn now, `unrecorded`."""

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_drawn": {}}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._mark = next(_marks)
