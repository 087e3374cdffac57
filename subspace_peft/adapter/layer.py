"""SubspaceLayer: any module with parameters, run with origin + P theta_d in their place."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from operator import attrgetter
from typing import Any

import torch
from accelerate.utils import align_module_device
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..coordinates import Coordinates
from . import merging, statistics
from .forward import adapted
from .mixed_batch import mixed_batch
from .modules import device_of
from .vectors import SubspaceVectors


class SubspaceLayer(nn.Module, BaseTunerLayer):
    """A target module whose parameters P theta_d moves.

    `forward`, `mixed_batch`, `merging` and `statistics` hold what is done with the increments that are made here.

    Args:
        base_layer: The module as it was; its parameters are the origin.
        vectors: The owner of theta_d.
    """

    adapter_layer_names = ("subspace_peft_theta_d",)
    other_param_names = ("coordinates", *statistics.BUFFERS)

    def __init__(self, base_layer: nn.Module, vectors: SubspaceVectors):
        super().__init__()
        self.base_layer = base_layer
        object.__setattr__(self, "vectors", vectors)  # unregistered: the base model owns it
        self.coordinates: dict[str, dict[str, Coordinates]] = {}  # adapter -> path in the base module -> what moves
        self.merged_elsewhere: dict[str, set[str]] = {}  # adapter -> paths whose tensor another layer merges
        statistics.add_buffers(self)
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.base_statistics: dict[str, Tensor] = {}  # what merging wrote over, by name
        self.replaced_origins: dict[str, Tensor] = {}  # the parameters that merged adapters replace, by path
        self.register_forward_pre_hook(_no_fast_path)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unsupported layer type")  # PEFT's list; every module is supported here
            try:
                self.in_features, self.out_features = _get_in_out_features(base_layer)
            except ValueError:  # MultiheadAttention with keys or values of another size
                self.in_features = self.out_features = None

    @property
    def subspace_peft_theta_d(self) -> nn.ParameterDict:
        return self.vectors.subspace_peft_theta_d

    def __getattr__(self, name: str) -> Any:
        """Attributes the layer lacks come from the base module, because models read attributes of their submodules.

        accelerate's hooks do not: accelerate looks for them on each module separately.
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

    # --------------------------------------------------------------------------------------------------- its adapters

    def add_adapter(
        self, adapter: str, coordinates: dict[str, Coordinates], merged_elsewhere: Iterable[str] = ()
    ) -> None:
        """Move the parameters at these paths inside the base module.

        Args:
            merged_elsewhere: The paths whose tensor another layer holds too and merges.
        """
        self.coordinates[adapter] = coordinates
        self.merged_elsewhere[adapter] = set(merged_elsewhere)
        statistics.add_adapter(self, adapter)

    def delete_adapter(self, adapter_name: str) -> None:
        self.merged_elsewhere.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def enable_adapters(self, enabled: bool) -> None:
        """As in PEFT, but unmerge at once: the layer that merged a tied tensor may run after the others."""
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move theta_d to the device of the base module, but not to its dtype, to which PEFT would round it."""
        theta_d = self.subspace_peft_theta_d.get(adapter_name)
        device = device or device_of(self.base_layer)
        if theta_d is not None and theta_d.device.type != "meta" and theta_d.device != device:
            self.subspace_peft_theta_d[adapter_name] = theta_d.to(device)

    def held(self, adapters: Iterable[str]) -> list[str]:
        """Those of the adapters that move this module.

        Raises:
            ValueError: if more than one of them replaces a weight.
        """
        held = [adapter for adapter in adapters if adapter in self.coordinates]
        if len(held) < 2:
            return held
        replacing = [adapter for adapter in held if any(c.replaces for c in self.coordinates[adapter].values())]
        if len(replacing) > 1:
            raise ValueError(
                f"At most one active adapter can replace a weight, got {replacing}; activate one with set_adapter."
            )
        return held

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether LoRA can hold the adapter: all it does here is add to the weight of a linear module."""
        if not isinstance(self.base_layer, (nn.Linear, Conv1D)):
            return False
        coordinates = self.coordinates.get(adapter_name)
        return coordinates is None or (set(coordinates) == {"weight"} and not coordinates["weight"].replaces)

    # ----------------------------------------------------------------------------------------------- their increments

    def normalised(self, adapter: str) -> Tensor:
        """z, the normalised theta_d, on the device of this layer, as a model may be spread over several: [d]."""
        return self.vectors.normalised(adapter).to(device_of(self.base_layer))

    def origin(self, path: str) -> Tensor:
        """The base's own parameter, also while an adapter that replaces it is merged."""
        return self.replaced_origins[path] if path in self.replaced_origins else attrgetter(path)(self.base_layer)

    def _increment(self, path: str, coordinates: Coordinates, z: Tensor) -> Tensor:
        increment = coordinates.increment(z)
        return increment - self.origin(path) if coordinates.replaces else increment

    def increments(self, adapters: list[str], skip: Iterable[str] = ()) -> dict[str, Tensor]:
        """The sum of these adapters' increments to each parameter, by its path inside the base module."""
        total: dict[str, Tensor] = {}
        for adapter in adapters:
            z = self.normalised(adapter)
            for path, coordinates in self.coordinates[adapter].items():
                if path not in skip:
                    increment = self._increment(path, coordinates, z)
                    total[path] = total[path] + increment if path in total else increment
        return total

    def moved(self, adapters: list[str]) -> dict[str, Tensor]:
        """origin + P theta_d of these adapters for each parameter, by its path inside the base module."""
        tensors: dict[str, Tensor] = {}
        for adapter in adapters:
            z = self.normalised(adapter)
            for path, coordinates in self.coordinates[adapter].items():
                origin = tensors[path] if path in tensors else attrgetter(path)(self.base_layer)
                z = z.to(torch.promote_types(z.dtype, origin.dtype))
                if coordinates.replaces and path in tensors:
                    tensors[path] = origin + self._increment(path, coordinates, z)
                else:
                    tensors[path] = coordinates.moved_from(origin, z)
        return {path: tensor.to(attrgetter(path)(self.base_layer).dtype) for path, tensor in tensors.items()}

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The adapter's increment to the weight, in the shape of the weight."""
        return self._increment("weight", self.coordinates[adapter]["weight"], self.normalised(adapter))

    # --------------------------------------------------------------------------------------------- running and merging

    def forward(self, *args, adapter_names: list[str] | None = None, **kwargs):
        if adapter_names is not None:
            return mixed_batch(self, adapter_names, *args, **kwargs)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(*args, **kwargs)
        adapters = self.held(self.active_adapters)
        if self.merged or not adapters:
            return self.base_layer(*args, **kwargs)
        with align_module_device(self.base_layer):  # offloaded weights are read before the base module's own forward
            return adapted(self, adapters, *args, **kwargs)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add increments to the parameters of the base module, and take over the first adapter's statistics.

        Raises:
            ValueError: with `safe_merge`, if a merged parameter would not be finite; that adapter is not merged.
        """
        merging.merge(self, self.held(check_adapters_to_merge(self, adapter_names)), safe_merge)

    @torch.no_grad()
    def unmerge(self) -> None:
        merging.unmerge(self)


def _no_fast_path(module: nn.Module, args: tuple) -> None:
    """Does nothing, but nn.TransformerEncoderLayer in eval mode calls its submodules only if one has such a hook.

    Otherwise it reads their weights, and the adapter would not act.
    """
