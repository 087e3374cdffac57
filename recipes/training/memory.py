"""Memory: the most that torch allocates at once, and what a forward holds for the backward pass."""

import gc
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile


def peak(function: Callable[[], Any]) -> int:
    """Bytes at the most while the function runs, beyond what is held before."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes))


def held_for_backward(function: Callable[[], Tensor], module: nn.Module, *others: Tensor) -> int:
    """Bytes that autograd holds once the function has run, without the module's parameters and these other tensors."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *others)}
    held = {}

    def pack(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            held[storage.data_ptr()] = storage  # it lives on, so that no other has its place

    # nothing goes backward here, and the graph would hold a tensor of its own in a circle
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing):
        result = function()
    assert result.requires_grad
    return sum(storage.nbytes() for storage in held.values())
