"""The parameters of a model that train: whole, and by the names that they have without any wrapper."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, distributed, nn


WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")


def is_main_process() -> bool:
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def wait_for_all() -> None:
    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP and torch.compile."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model._orig_mod
        else:
            return model


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains, by the names of the model inside DDP, FSDP, torch.compile; wide dtypes first, which aligns a file.

    Raises:
        ValueError: if nothing does, or DeepSpeed's ZeRO-3 has left empty tensors in the place of its parameters.
    """
    model = unwrapped(model)
    found = {WRAPPERS.sub("", name).lstrip("."): p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise ValueError(
            "A trajectory is of parameters that train, this model has none; set requires_grad, or record the base "
            "model before it is wrapped as a PeftModel."
        )
    for name, parameter in found.items():
        if hasattr(parameter, "ds_id"):
            raise ValueError(
                f"Parameters must be there to be recorded, DeepSpeed's ZeRO-3 has left `{name}` empty; take ZeRO-2 or "
                "FSDP."
            )
    return dict(sorted(found.items(), key=lambda item: -item[1].dtype.itemsize))


def whole(parameter: nn.Parameter) -> Tensor:
    """All of a parameter that FSDP2 shards (a DTensor); every process must ask."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def gathered(model: nn.Module) -> AbstractContextManager:
    """Inside, parameters that FSDP of version 1 has flattened and sharded are whole on the main process."""
    if distributed.is_available() and distributed.is_initialized():
        from torch.distributed.fsdp import FullyShardedDataParallel

        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            offload = any(parameter.is_cuda for parameter in model.parameters())
            return FullyShardedDataParallel.summon_full_params(
                model, writeback=False, rank0_only=offload, offload_to_cpu=offload
            )
    return nullcontext()
