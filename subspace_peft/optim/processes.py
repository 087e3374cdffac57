"""Sums and means over the processes of torch.distributed; with one process, the number itself."""

import torch
import torch.distributed as dist
from torch import Tensor


def sum_over_processes(x: Tensor) -> Tensor:
    """The same number on every process, in at least single precision."""
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    if process_count() > 1:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
    return x


def mean_over_processes(x: Tensor) -> Tensor:
    return sum_over_processes(x) / process_count()


def process_count() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
