"""Scratch: memory to which one moved tensor after another is written.

On a CPU a large tensor takes fresh pages, and to touch these takes half as long as to compute what is written.
"""

import threading
from math import prod
from sys import getrefcount

import torch
from torch import Tensor


BUFFERS = 2
BUFFER_BYTES = 2**26  # of the largest that is kept: a weight of 4096 x 4096 in float32

USERS = getattr(torch._C, "_storage_Use_Count", None)
"""Counts the tensors and objects that share a storage; without it no memory is used again."""

_buffers: list[torch.UntypedStorage] = []
_lock = threading.Lock()


def empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A contiguous tensor in memory that nothing else uses; others get it when all tensors that share it are gone."""
    size = prod(shape) * like.itemsize
    is_plain = type(like) in (Tensor, torch.nn.Parameter) and like.device.type == "cpu"
    if not is_plain or size > BUFFER_BYTES or USERS is None:
        return like.new_empty(shape)
    with _lock:
        return torch.empty(0, dtype=like.dtype, device="cpu").set_(_free(size), 0, shape)


def is_scratch(storage: torch.UntypedStorage) -> bool:
    return any(storage is buffer for buffer in _buffers)


def _free(size: int) -> torch.UntypedStorage:
    # nothing shares the memory, and of the storage, which Python has one object of, only the list knows
    free = [at for at in range(len(_buffers)) if USERS(_buffers[at]._cdata) == 1 and getrefcount(_buffers[at]) == 2]
    for at in free:
        if _buffers[at].nbytes() >= size and not _buffers[at].is_shared():
            return _buffers[at]
    if len(_buffers) == BUFFERS:
        del _buffers[free[0] if free else 0]
    _buffers.append(torch.UntypedStorage(size))
    return _buffers[-1]
