"""SubspaceLayer: any module with parameters, run with origin + P theta_d in place of its parameters."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import torch
from accelerate.utils import align_module_device
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..coordinates import Coordinates, LowRank, factored
from .modules import device_of, in_place_of, is_linear_in_parameters
from .vectors import SubspaceVectors


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class SubspaceLayer(nn.Module, BaseTunerLayer):
    """A target module whose parameters are moved by P theta_d.

    Args:
        base_layer: The module as it was; its parameters are the origin.
        vectors: Holds theta_d.
    """

    adapter_layer_names = ("subspace_peft_theta_d",)
    other_param_names = ("coordinates", *(f"subspace_peft_{name}" for name in STATISTICS))

    def __init__(self, base_layer: nn.Module, vectors: SubspaceVectors):
        super().__init__()
        self.base_layer = base_layer
        object.__setattr__(self, "vectors", vectors)
        self.coordinates: dict[str, dict[str, Coordinates]] = {}
        self.shared: dict[str, set[str]] = {}
        for name in STATISTICS:
            has = isinstance(getattr(base_layer, name, None), Tensor)
            setattr(self, f"subspace_peft_{name}", BufferDict(persistent=True) if has else {})
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._unmerged_statistics: dict[str, Tensor] = {}
        self._replaced: dict[str, Tensor] = {}
        self.register_forward_pre_hook(_no_fast_path)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unsupported layer type")  # none is, here
            try:
                self.in_features, self.out_features = _get_in_out_features(base_layer)
            except ValueError:  # MultiheadAttention whose keys have a width of their own
                self.in_features = self.out_features = None

    @property
    def subspace_peft_theta_d(self) -> nn.ParameterDict:
        return self.vectors.subspace_peft_theta_d

    def __getattr__(self, name: str) -> Any:
        """Names that the layer lacks are the base module's: models ask their parts for more than to be called.

        But not accelerate's hooks, which it looks for on each module apart.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base_layer")
            if base is None or name.startswith(("__", "_hf_", "_old_forward")):
                raise
            return getattr(base, name)

    def __repr__(self) -> str:
        return "subspace_peft." + super().__repr__()

    def add_adapter(self, adapter: str, coordinates: dict[str, Coordinates], owned_elsewhere: set[str] = frozenset()):
        """Move the parameters at these paths inside the base module.

        Args:
            owned_elsewhere: The paths whose tensor another layer holds too, and merges.
        """
        self.coordinates[adapter] = coordinates
        self.shared[adapter] = set(owned_elsewhere)
        for name in STATISTICS:
            held = getattr(self, f"subspace_peft_{name}")
            if isinstance(held, BufferDict):
                held[adapter] = self.base_statistic(name).detach().clone()

    def delete_adapter(self, adapter_name: str) -> None:
        self.shared.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def enable_adapters(self, enabled: bool) -> None:
        """PEFT's; a tied tensor is unmerged by its owner, which may not be the first to run."""
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """The device only: PEFT's would also round theta_d to the dtype of the base."""
        theta_d = self.subspace_peft_theta_d.get(adapter_name)
        device = device or device_of(self.base_layer)
        if theta_d is not None and theta_d.device.type != "meta" and theta_d.device != device:
            self.subspace_peft_theta_d[adapter_name] = theta_d.to(device)

    def _here(self, adapters) -> list[str]:
        here = [adapter for adapter in adapters if adapter in self.coordinates]
        if len(here) < 2:
            return here
        replacing = [adapter for adapter in here if any(c.replaces for c in self.coordinates[adapter].values())]
        if len(replacing) > 1:
            raise ValueError(
                f"At most one active adapter can replace a weight, got {replacing}; activate one with set_adapter."
            )
        return here

    def origin(self, path: str) -> Tensor:
        """The base's own parameter, also while an adapter that replaces it is merged."""
        return self._replaced[path] if path in self._replaced else attrgetter(path)(self.base_layer)

    def _increment(self, path: str, coordinates: Coordinates, z: Tensor) -> Tensor:
        increment = coordinates.increment(z)
        return increment - self.origin(path) if coordinates.replaces else increment

    def increments(self, adapters: list[str], skip=()) -> dict[str, Tensor]:
        """The sum of the increments of these adapters to each parameter, by its path inside the base module."""
        total: dict[str, Tensor] = {}
        for adapter in adapters:
            z = self._z(adapter)
            for path, coordinates in self.coordinates[adapter].items():
                if path not in skip:
                    increment = self._increment(path, coordinates, z)
                    total[path] = total[path] + increment if path in total else increment
        return total

    def moved(self, adapters: list[str]) -> dict[str, Tensor]:
        """origin + P theta_d of these adapters for each parameter, by its path inside the base module."""
        tensors: dict[str, Tensor] = {}
        for adapter in adapters:
            z = self._z(adapter)
            for path, coordinates in self.coordinates[adapter].items():
                origin = tensors[path] if path in tensors else attrgetter(path)(self.base_layer)
                z = z.to(torch.promote_types(z.dtype, origin.dtype))
                if coordinates.replaces and path in tensors:
                    tensors[path] = origin + self._increment(path, coordinates, z)
                else:
                    tensors[path] = coordinates.moved_from(origin, z)
        return {path: tensor.to(attrgetter(path)(self.base_layer).dtype) for path, tensor in tensors.items()}

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to the weight, in the shape of the weight."""
        return self._increment("weight", self.coordinates[adapter]["weight"], self._z(adapter))

    def _z(self, adapter: str) -> Tensor:
        """theta_d normalised, on the device of this layer: a model may be spread over several. [d]"""
        return self.vectors.normalised(adapter).to(device_of(self.base_layer))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether LoRA can hold the adapter here: it adds to the weight of a linear module and does nothing else."""
        if not isinstance(self.base_layer, (nn.Linear, Conv1D)):
            return False
        coordinates = self.coordinates.get(adapter_name)
        return coordinates is None or (set(coordinates) == {"weight"} and not coordinates["weight"].replaces)

    def forward(self, *args, adapter_names: list[str] | None = None, **kwargs):
        if adapter_names is not None:
            return self._mixed_batch(adapter_names, *args, **kwargs)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(*args, **kwargs)
        adapters = self._here(self.active_adapters)
        if self.merged or not adapters:
            return self.base_layer(*args, **kwargs)
        with align_module_device(self.base_layer):  # offloaded weights are read before the base module's own forward
            return self._adapted(adapters, *args, **kwargs)

    def _adapted(self, adapters: list[str], *args, **kwargs):
        through = [a for a in adapters if self._runs_factored(a)]
        if self._adds_to_output() or len(through) == len(adapters):
            return self._added(adapters, through, *args, **kwargs)
        with in_place_of(self.base_layer, self.moved(adapters) | self._statistics(adapters[0])):
            return self.base_layer(*args, **kwargs)

    def _adds_to_output(self) -> bool:
        """Where origin + P theta_d would round the increment away, and the output is linear in the parameters."""
        return is_linear_in_parameters(self.base_layer) and self.base_layer.weight.dtype in (
            torch.float16,
            torch.bfloat16,
        )

    def _runs_factored(self, adapter: str) -> bool:
        """Whether x can go through the factors in turn, without their product."""
        coordinates = self.coordinates[adapter].get("weight")
        return isinstance(coordinates, LowRank) and factored.operation(self.base_layer) is not None

    def _added(self, adapters: list[str], through: list[str], *args, **kwargs):
        """op(x, W_0) + op(x, P theta_d), for an op that is linear in its parameters; without W_0 where it is replaced.

        Args:
            through: The adapters among them that run through their factors.
        """
        base = self.base_layer
        x = args[0] if args else next(iter(kwargs.values()))
        factors = {}
        for adapter in through:
            z = self._z(adapter)
            z = z.to(torch.promote_types(z.dtype, base.weight.dtype))
            factors[adapter] = self.coordinates[adapter]["weight"].factors(z)
        replacing = next((a for a in through if self.coordinates[a]["weight"].replaces), None)
        if replacing is None:
            output = base(*args, **kwargs)
        else:
            output = factored.run(base, x, *factors.pop(replacing), getattr(base, "bias", None))
        for left, right in factors.values():
            output = output + factored.run(base, x, left, right).to(output.dtype)
        rest = [adapter for adapter in adapters if adapter not in through]
        if rest:
            increments = self.increments(rest)
            tensors = {
                path: increments[path].to(parameter.dtype) if path in increments else torch.zeros_like(parameter)
                for path, parameter in base.named_parameters(recurse=False)
            }
            with in_place_of(base, tensors):
                output = output + base(*args, **kwargs)
        return output

    def base_statistic(self, name: str) -> Tensor:
        """The base's own, also while an adapter is merged."""
        return self._unmerged_statistics.get(name, getattr(self.base_layer, name))

    def _statistics(self, adapter: str) -> dict[str, Tensor]:
        """The adapter's own batch-norm statistics: training changes these and leaves the base's alone."""
        held = {name: getattr(self, f"subspace_peft_{name}") for name in STATISTICS}
        return {name: buffers[adapter] for name, buffers in held.items() if adapter in buffers}

    def _mixed_batch(self, adapter_names: list[str], x: Tensor, *args, **kwargs) -> Tensor:
        """Each sample of the batch through its own adapter; "__base__" is none."""
        if self.merged or self.disable_adapters:
            raise ValueError(
                "Cannot pass `adapter_names` while adapters are merged or disabled; unmerge or enable them."
            )
        others = any(isinstance(other, Tensor) for other in (*args, *kwargs.values()))
        if not isinstance(x, Tensor) or x.shape[0] != len(adapter_names) or others:
            raise ValueError(
                f"`adapter_names` must have one name for each sample along dimension 0 of the input of "
                f"{type(self.base_layer)}, got {len(adapter_names)} names; run such a batch one adapter at a time, "
                "with set_adapter."
            )
        output = None
        for name in dict.fromkeys(adapter_names):
            index = torch.tensor([i for i, other in enumerate(adapter_names) if other == name], device=x.device)
            here = self._here([name])
            part = x.index_select(0, index)
            y = self._adapted(here, part, *args, **kwargs) if here else self.base_layer(part, *args, **kwargs)
            if not isinstance(y, Tensor) or y.shape[0] != len(index):
                raise ValueError(f"`adapter_names` cannot split the output of {type(self.base_layer)} into samples.")
            output = y.new_empty(len(adapter_names), *y.shape[1:]) if output is None else output
            output = output.index_copy(0, index, y)
        return output

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the increments to the parameters of the base module, and take over the adapter's statistics.

        Raises:
            ValueError: with `safe_merge`, if a merged parameter would not be finite; nothing is changed then.
        """
        here = self._here(check_adapters_to_merge(self, adapter_names))
        self._here([*self.merged_adapters, *here])
        replaced = self._replaced
        self._replaced = replaced | self._about_to_be_replaced(here)
        for adapter in here:
            merged = {
                parameter: parameter + increment.to(parameter.device)
                for parameter, increment in self._owned_increments(adapter)
            }
            if safe_merge and not all(tensor.isfinite().all() for tensor in merged.values()):
                self._replaced = replaced
                raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
            for parameter, tensor in merged.items():
                parameter.data = tensor.to(parameter.dtype)
            if not self.merged:  # of several adapters the first one's statistics count, as in forward
                self._swap_statistics(self._statistics(adapter))
            self.merged_adapters.append(adapter)

    @torch.no_grad()
    def unmerge(self) -> None:
        if not self.merged:
            return
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            for parameter, increment in self._owned_increments(adapter):
                parameter.data = (parameter - increment.to(parameter.device)).to(parameter.dtype)
        for path, origin in self._replaced.items():  # subtracting gives it back but for its last digits
            attrgetter(path)(self.base_layer).data = origin
        self._replaced = {}
        for name, statistic in self._unmerged_statistics.items():
            getattr(self.base_layer, name).copy_(statistic)
        self._unmerged_statistics = {}

    def _about_to_be_replaced(self, adapters: list[str]) -> dict[str, Tensor]:
        """The base's own parameters that these adapters replace, but those that another layer merges."""
        found = {}
        for adapter in adapters:
            for path, coordinates in self.coordinates[adapter].items():
                if coordinates.replaces and path not in self.shared[adapter]:
                    parameter = attrgetter(path)(self.base_layer)
                    added = self.increments(self.merged_adapters).get(path, torch.zeros_like(parameter))
                    found[path] = (parameter - added.to(parameter.device)).to(parameter.dtype)
        return found

    def _owned_increments(self, adapter: str) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for path, increment in self.increments([adapter], skip=self.shared[adapter]).items():
            yield attrgetter(path)(self.base_layer), increment

    def _swap_statistics(self, statistics: dict[str, Tensor]) -> None:
        for name, statistic in statistics.items():
            own = getattr(self.base_layer, name)
            self._unmerged_statistics.setdefault(name, own.clone())
            own.copy_(statistic)


def _no_fast_path(module: nn.Module, args: tuple) -> None:
    """nn.TransformerEncoderLayer in eval mode reads its parts' weights and calls no part, unless one has a hook."""
