"""The parameters and buffers that training changes: whole, and under their names in the plain model."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, distributed, nn


COMPILED = "_orig_mod"
"""The child of what torch.compile makes of a module; names of tensors leave it out."""

WRAPPERS = re.compile(rf"(^|\.)({COMPILED}|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")


def is_main_process() -> bool:
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def has_other_processes() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def wait_for_all() -> None:
    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP and torch.compile."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif COMPILED in model._modules:
            model = model._modules[COMPILED]
        else:
            return model


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, under their names without DDP, FSDP and torch.compile.

    Raises:
        ValueError: if nothing trains, or DeepSpeed's ZeRO-3 has replaced the parameters by empty tensors.
    """
    model = unwrapped(model)
    parameters = {_plain(name): p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError(
            "A trajectory records parameters that train, this model has none; set requires_grad, or record the base "
            "model before it is wrapped as a PeftModel."
        )
    for name, parameter in parameters.items():
        if is_partitioned(parameter):
            raise ValueError(
                f"Parameters must not be sharded by DeepSpeed's ZeRO-3 to be recorded, `{name}` is; use ZeRO-2 or "
                "FSDP."
            )
    return parameters


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers in the state dict, which training may change as it does batch norm's statistics, by these names.

    Without those of modules inside an adapter's layer: training changes the adapter's own.
    """
    return {
        _plain(f"{prefix}.{name}"): buffer
        for prefix, module in unwrapped(model).named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set and "base_layer" not in prefix.split(".")
    }


def _plain(name: str) -> str:
    return WRAPPERS.sub("", name).lstrip(".")


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed's ZeRO-3 keeps a part of it in each process, of which torch sees nothing but shape [0]."""
    return hasattr(parameter, "ds_id")


def is_distributed(parameter: nn.Parameter) -> bool:
    """Whether it is a DTensor, made by FSDP2 or by tensor parallelism."""
    return hasattr(parameter, "full_tensor")


def whole(parameter: nn.Parameter) -> Tensor:
    """All of a parameter that FSDP2 shards (a DTensor). Call it on every process."""
    return parameter.full_tensor() if is_distributed(parameter) else parameter


def shape_of(parameter: Tensor) -> tuple[int, ...]:
    """All of its shape, also where DeepSpeed's ZeRO-3 keeps a part of it in each process."""
    return tuple(parameter.ds_shape if is_partitioned(parameter) else parameter.shape)


class HasSubstitutes:
    """A module that reads its parameters through `substitute`, where there is one, which returns what acts instead.

    It gets the name of a parameter and all of it, also where the model is sharded but for its forward.
    """

    substitute: Callable[[str, Tensor], Tensor] | None = None


def gathered(model: nn.Module) -> AbstractContextManager:
    """A context in which the main process has whole the parameters that FSDP of version 1 flattened and sharded."""
    if distributed.is_available() and distributed.is_initialized():
        from torch.distributed.fsdp import FullyShardedDataParallel

        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            offload = any(parameter.is_cuda for parameter in model.parameters())
            return FullyShardedDataParallel.summon_full_params(
                model, writeback=False, rank0_only=offload, offload_to_cpu=offload
            )
    return nullcontext()
