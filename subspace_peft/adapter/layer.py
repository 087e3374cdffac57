"""SubspaceLayer: any module with parameters, run with origin + P theta_d in their place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..coordinates import Coordinates
from . import merging, outside, quantised, statistics
from .forming import Form
from .forward import adapted
from .mixed_batch import mixed_batch
from .modules import alone, device_of, features, is_linear_in_parameters
from .reading import Reads
from .strength import Strength
from .vectors import VECTORS, SubspaceVectors, ThetaD


class SubspaceLayer(nn.Module, Strength, BaseTunerLayer):
    """A target module whose parameters P theta_d moves.

    `forward`, `mixed_batch`, `merging`, `outside` and `statistics` hold what is done with the increments made here.

    Args:
        base_layer: The module as it was; its parameters are the origin.
        vectors: The owner of theta_d.
    """

    adapter_layer_names = ("subspace_peft_theta_d",)
    other_param_names = ("coordinates", *statistics.BUFFERS)

    def __init__(self, base_layer: nn.Module, vectors: SubspaceVectors):
        super().__init__()
        object.__setattr__(self, "vectors", vectors)  # unregistered: the base model owns it
        self.coordinates: dict[str, dict[str, Coordinates]] = {}  # adapter -> path in the base module -> what moves
        self.merged_elsewhere: dict[str, set[str]] = {}  # adapter -> paths whose tensor another layer merges
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.replaced_origins: dict[str, Tensor] = {}  # the parameters that merged adapters replace, by path
        self.base_statistics: dict[str, Tensor] = {}  # the base's, while those of an adapter are in use
        self.statistics_of: str | None = None  # the adapter whose statistics are in use
        self.quantised_base: list[nn.Module] = []  # the base module, while a plain one with merged adapters is there
        self.samples: list[str] | None = None  # the adapter of each sample, while a mixed batch runs
        self.reads = Reads()
        self.is_linear = is_linear_in_parameters(base_layer) or quantised.is_quantised_linear(base_layer)
        self.in_features, self.out_features = features(base_layer)
        self.names_of_the_base = set(base_layer.__dict__)
        self.base_layer = base_layer  # last: what is set after it and is not the layer's own is set on it
        statistics.add_buffers(self)
        self.register_forward_pre_hook(_no_fast_path)

    @property
    def subspace_peft_theta_d(self) -> ThetaD:
        return self.vectors.subspace_peft_theta_d

    @property
    def quantization_backend(self) -> QuantizationBackend | None:
        """What PEFT knows of how the base module is quantised, for the status of a model."""
        return quantised.backend_of(self.base_layer)

    # ---------------------------------------------------------------------------- what others do with its base module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base_layer" not in self.__dict__.get("_modules", ()) or name.startswith(outside.OF_WRAPPERS):
                raise
        return outside.get(self, name)

    @property
    def weight(self) -> Tensor | None:
        return outside.get(self, "weight")

    @property
    def bias(self) -> Tensor | None:
        return outside.get(self, "bias")

    def __setattr__(self, name: str, value: Any) -> None:
        if outside.is_of_the_base(self, name):
            outside.set_on_base(self, name, value)
        else:
            super().__setattr__(name, value)

    def __deepcopy__(self, memo: dict) -> SubspaceLayer:
        """In a copy of the whole model the base model owns theta_d; in one of a part of it, the first layer."""
        is_first = id(self.vectors) not in memo
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        if is_first:
            twin.add_module(VECTORS, twin.vectors)
        return twin

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
        if self.statistics_of == adapter_name:
            statistics.switch(self, None)
        self.merged_elsewhere.pop(adapter_name, None)
        super().delete_adapter(adapter_name)
        self._switched()

    def enable_adapters(self, enabled: bool) -> None:
        """As in PEFT, but unmerge at once: the layer that merged a tied tensor may run after the others."""
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)
        self._switched()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode)
        self._switched()

    def _switched(self) -> None:
        """Other adapters act from now on."""
        self.reads.clear()
        statistics.switch(self, statistics.in_use(self))

    def _apply(self, fn: Callable, recurse: bool = True) -> SubspaceLayer:
        super()._apply(fn, recurse)
        statistics.convert(self, fn)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> SubspaceLayer:
        """As in torch, for theta_d too: transformers freezes the layers of an adapter that it loads for inference."""
        self.subspace_peft_theta_d.requires_grad_(requires_grad)
        return super().requires_grad_(requires_grad)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move theta_d to the device of the base module, but not to its dtype, to which PEFT would round it."""
        theta_d = self.subspace_peft_theta_d
        device = device or device_of(self.base_layer)
        if adapter_name in theta_d and theta_d[adapter_name].device not in (torch.device("meta"), device):
            theta_d[adapter_name] = theta_d[adapter_name].to(device)

    def held(self, adapters: Iterable[str]) -> list[str]:
        """Those of the adapters that move this module.

        Raises:
            ValueError: if more than one of them replaces a weight.
        """
        held = [adapter for adapter in dict.fromkeys(adapters) if adapter in self.coordinates]
        if len(held) < 2:
            return held
        replacing = [adapter for adapter in held if any(c.replaces for c in self.coordinates[adapter].values())]
        if len(replacing) > 1:
            raise ValueError(
                f"At most one active adapter can replace a weight, got {replacing}; activate one with set_adapter."
            )
        return held

    def acting(self) -> list[str]:
        """The adapters that move this module now, all of them or samples, and are not in its parameters already."""
        if self.disable_adapters or self.merged:
            return []
        if self.samples is not None:
            return [adapter for adapter in dict.fromkeys(self.samples) if adapter in self.coordinates]
        return self.held(self.active_adapters)

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
        """The base's own parameter, also while an adapter that replaces it is merged; dequantised."""
        origin = self.replaced_origins[path] if path in self.replaced_origins else getattr(self.base_layer, path)
        return quantised.entries(self) if quantised.is_quantised(origin) else origin

    def form(self, path: str, zs: dict[str, Tensor], origin: Tensor | None, dtype: torch.dtype | None = None) -> Form:
        """How one parameter is formed from the normalised theta_d of adapters; see Form."""
        terms = [(self.coordinates[adapter][path], z) for adapter, z in zs.items()]
        needs_base = any(c.replaces for c, _ in terms) and (origin is None or len(terms) > 1)
        base = self.origin(path) if needs_base else None
        if origin is not None and quantised.is_quantised(origin):
            origin = quantised.entries(self)
        return Form(terms, origin, base, dtype)

    def zs(self, adapters: Iterable[str], skip: Iterable[str] = ()) -> dict[str, dict[str, Tensor]]:
        """The normalised theta_d of those of the adapters that move each parameter, by its path."""
        by_path: dict[str, dict[str, Tensor]] = {}
        for adapter in adapters:
            z = self.normalised(adapter)
            for path in self.coordinates[adapter]:
                if path not in skip:
                    by_path.setdefault(path, {})[adapter] = z
        return by_path

    def increments(self, adapters: list[str], skip: Iterable[str] = ()) -> dict[str, Tensor]:
        """The sum of these adapters' increments to each parameter, by its path inside the base module."""
        return {path: self.form(path, zs, None)() for path, zs in self.zs(adapters, skip).items()}

    def moved(self, adapters: list[str]) -> dict[str, Tensor]:
        """origin + P theta_d of these adapters for each parameter, by its path inside the base module."""
        zs_of = self.zs(adapters)
        return {path: self.form(path, zs, getattr(self.base_layer, path))() for path, zs in zs_of.items()}

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The adapter's increment to the weight, in the shape of the weight."""
        return self.form("weight", {adapter: self.normalised(adapter)}, None)()

    # --------------------------------------------------------------------------------------------- running and merging

    def forward(self, *args, adapter_names: list[str] | None = None, **kwargs):
        adapter_names = self.samples if adapter_names is None else adapter_names
        if adapter_names is not None:
            with alone(self.base_layer):
                return mixed_batch(self, adapter_names, *args, **kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapters = self.acting()
        if not adapters:
            return self.base_layer(*args, **kwargs)
        with alone(self.base_layer):
            return adapted(self, adapters, *args, **kwargs)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add increments to the parameters of the base module, which keeps the last adapter's statistics.

        Raises:
            ValueError: with `safe_merge`, if a merged parameter would not be finite; that adapter is not merged.
        """
        try:
            merging.merge(self, self.held(check_adapters_to_merge(self, adapter_names)), safe_merge)
        finally:
            self._switched()

    @torch.no_grad()
    def unmerge(self) -> None:
        merging.unmerge(self)
        self._switched()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base module, with the increments in it, or with its own statistics again; what it contains likewise."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        elif not self.merged:
            statistics.switch(self, None)
        unload_inside(self.base_layer, merge, safe_merge, adapter_names)
        return self.base_layer


def unload_inside(module: nn.Module, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> None:
    """Put the base modules of the layers inside this module in their places, where PEFT does not look."""
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, SubspaceLayer):
                unmerged = merge and not child.merged  # a module under several names comes more than once
                setattr(parent, name, child.unload_and_optionally_merge_module(unmerged, safe_merge, adapter_names))


def _no_fast_path(module: nn.Module, args: tuple) -> None:
    """Does nothing, but nn.TransformerEncoderLayer in eval mode calls its submodules only if one has such a hook.

    Otherwise it reads their weights, and the adapter would not act.
    """
