"""SubspaceModel: the tuner that PEFT puts around a model, with one theta_d for all its target tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from ..plain_model import unwrapped
from . import file as adapter_file
from . import merging, quantised, statistics
from .config import SubspaceConfig
from .embeddings import EMBEDDINGS, embeddings, key_in_file
from .expansion import expanded
from .fingerprint import fingerprint, identity
from .given_projection import GIVEN
from .layer import SubspaceLayer, unload_inside
from .mixed_batch import handing_over
from .plan import Plan, moved_shapes
from .renaming import UNCHANGED, Renaming, renamings
from .root import add_vectors, remove_vectors
from .saved_whole import check_none_saved, names_saved_whole, with_heads
from .strength import check_weights, one_strength
from .targets import Target, find_targets, is_named, refuse_all, refuse_ties_apart
from .undo import undone_if_it_fails
from .vectors import PREFIX, VECTORS, SubspaceVectors, check_adapter_name
from .walk import uncompiled, unique_coordinates


OF_THE_ROOT = f"model.{VECTORS}"
"""The name in SubspaceModel of the vectors, which are a module of the base model."""


class SubspaceModel(BaseTuner):
    """A model that trains theta_d, d parameters, in place of the D entries of theta = origin + P theta_d.

    `get_peft_model(model, SubspaceConfig(...))` makes one.
    """

    prefix = PREFIX
    tuner_layer_cls = SubspaceLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    # ---------------------------------------------------------------------------------------------- wrapping a model

    def __init__(self, model, peft_config, adapter_name, *args, **kwargs):
        of_a_peft_model = isinstance(peft_config, dict)  # which keeps this object; inject_adapter_in_model does not
        if of_a_peft_model:
            peft_config = {adapter_name: with_heads(peft_config[adapter_name])}
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        if of_a_peft_model:
            model.hides_vectors = True

    def named_children(self):
        """The base model, and the vectors under their name in it."""
        yield from super().named_children()
        vectors = getattr(self.model, VECTORS, None)
        if vectors is not None and self.model.hides_vectors:
            yield OF_THE_ROOT, vectors

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As in torch, also where the vectors are put back: as SyncBatchNorm does, and FSDP1 by setattr."""
        add, name = (self.model.add_module, VECTORS) if name == OF_THE_ROOT else (super().add_module, name)
        add(name, module)

    def __setattr__(self, name: str, value) -> None:
        owner, name = (self.model, VECTORS) if name == OF_THE_ROOT else (super(), name)
        owner.__setattr__(name, value)

    def inject_adapter(
        self, model, adapter_name, autocast_adapter_dtype=True, low_cpu_mem_usage=False, state_dict=None
    ) -> None:
        """As in PEFT, but without `state_dict`: the keys of a file name no modules, so the config says where to go."""
        check_adapter_name(adapter_name, names_saved_whole(self.peft_config[adapter_name]))
        vectors = getattr(model, VECTORS, None)
        if vectors is not None and adapter_name in vectors.subspace_peft_theta_d:
            raise ValueError(
                f"Each adapter of a model needs a name of its own, {adapter_name!r} is taken; choose another name or "
                "delete that adapter first."
            )
        config = self.peft_config[adapter_name]
        if not config.inference_mode:  # the user's stays as it is; PEFT promises that of from_pretrained(config=...)
            self.peft_config[adapter_name] = copy.copy(config)
        with undone_if_it_fails(model):
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)

    def _prepare_model(self, config: SubspaceConfig, model: nn.Module) -> None:
        """Plan and check everything before a module or the config is touched."""
        model = unwrapped(model)
        self._plan, self._renaming = None, UNCHANGED
        named, targets = self._find_targets(config, model)
        if targets:
            refuse_ties_apart(model, targets)
            self._plan = Plan(config, targets, self._renaming)
            config.target_modules, config.target_parameters = named.target_modules, named.target_parameters
        else:
            refuse_all(model, named, super()._check_target_module_exists, self._renaming)

    def _find_targets(self, config: SubspaceConfig, model: nn.Module) -> tuple[SubspaceConfig, list[Target]]:
        """The targets, and the config with their names, read by the first names that fit the fingerprint."""
        readings = []
        for renaming in renamings(config, model):
            named = expanded(config, model, renaming)
            targets = find_targets(model, named, partial(self._matches, named, renaming), renaming)
            readings.append((renaming, named, targets))
            expected = config.expected_fingerprint
            if expected is None or fingerprint(moved_shapes(config, targets)) == expected:
                break
        else:
            readings = readings[:1]
        self._renaming, named, targets = readings[-1]
        return named, targets

    def _matches(self, config: SubspaceConfig, renaming: Renaming, name: str) -> bool:
        return is_named(super()._check_target_module_exists(config, renaming(name)))

    def _check_target_module_exists(self, config: SubspaceConfig, key: str):
        """As in PEFT, but by the names that P is drawn from, and every target matches.

        So does a module that an earlier adapter wraps for its submodules, which PEFT passes over.
        """
        match = super()._check_target_module_exists(config, self._renaming(key))
        return match or self._holds_a_target(key) or match

    def _holds_a_target(self, key: str) -> bool:
        if self._plan is None:
            return False
        module = self.model.get_submodule(key)
        inside = {id(m) for m in module.base_layer.modules()} if isinstance(module, SubspaceLayer) else ()
        return any(target.layer is module or id(target.parent) in inside for target in self._plan.targets)

    def _create_and_replace(self, config, adapter_name, target, target_name, parent, current_key) -> None:
        """Carry out the whole plan at PEFT's first call: a tied tensor moves modules that PEFT makes no call for."""
        if self._plan is None:
            return
        if not hasattr(self.model, VECTORS):
            quantised.keep_unpacked(self.model)
            add_vectors(self.model, SubspaceVectors(adapter_name, quantised.float_dtype(self.model)))
        self._plan.apply(getattr(self.model, VECTORS), adapter_name)
        quantised.pass_gradients(self.model)
        self._plan = None

    def _inject_parameters(self, peft_config, model, adapter_name, low_cpu_mem_usage) -> list[str]:
        """The names in `target_parameters`, whose modules are targets of the plan."""
        return list(peft_config.target_parameters)

    def _prepare_adapter_config(self, peft_config, model_config):
        """As in PEFT, which knows targets of many models; but `target_parameters` alone are enough."""
        if peft_config.target_modules is None and peft_config.target_parameters:
            return peft_config
        return super()._prepare_adapter_config(peft_config, model_config)

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Keep theta_d in float32 or the base's float64, or cast it to the base's dtype if the user asks for that.

        PEFT would also cast batch-norm statistics, which must have the dtype of the base's.
        """
        theta_d = getattr(self.model, VECTORS).subspace_peft_theta_d
        layer = next(layer for layer in self._layers() if layer.coordinates.get(adapter_name))
        parameter = getattr(layer.base_layer, next(iter(layer.coordinates[adapter_name])))
        dtype = layer.vectors.float_dtype if quantised.is_quantised(parameter) else parameter.dtype
        if autocast_adapter_dtype:
            dtype = torch.float64 if dtype == torch.float64 else torch.float32
        if theta_d[adapter_name].dtype != dtype:
            theta_d[adapter_name] = theta_d[adapter_name].to(dtype)

    # ------------------------------------------------------------------------------------------------ using adapters

    def _layers(self) -> Iterator[SubspaceLayer]:
        return (module for module in self.model.modules() if isinstance(module, SubspaceLayer))

    @property
    def D(self) -> int:
        """The number of entries of theta, for the active adapter."""
        return self.peft_config[self.active_adapters[0]].D

    def moved_share(self, adapter_name: str = "default") -> float:
        """The share of the D entries of theta that P moves."""
        coordinates = unique_coordinates(self.model, adapter_name)
        return sum(c.moves for c in coordinates.values()) / self.peft_config[adapter_name].D

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str, **kwargs) -> None:
        """Add an adapter whose theta_d is the weighted sum of those of others, at their scales; P is linear.

        Raises:
            ValueError: if it would not be exact: for adapters with different P, low-rank coordinates, batch-norm
                statistics, modules saved whole or scales that differ from layer to layer, and for another
                `combination_type` than "linear".
        """
        if kwargs.get("combination_type", "linear") not in ("linear", None):
            raise ValueError(f"`combination_type` must be 'linear', got {kwargs['combination_type']!r}; leave it out.")
        if adapter_name in self.peft_config:
            raise ValueError(
                f"Each adapter of a model needs a name of its own, {adapter_name!r} is taken; choose another name."
            )
        check_weights(adapters, weights)
        merging.check_known("adapters", adapters, self.peft_config)
        configs = [self.peft_config[adapter] for adapter in adapters]
        identities = {identity(config) for config in configs}
        if len(identities) > 1 or configs[0].coordinates != "weight" or configs[0].projection in GIVEN:
            raise ValueError(
                "Adapters can be summed only if they share one seeded P (seed, d, projection, targets) over weight "
                f"coordinates, got {adapters}; merge them one after the other instead."
            )
        if any(statistics.of_adapter(layer, adapter) for layer in self._layers() for adapter in adapters):
            raise ValueError("Adapters that hold batch-norm statistics have no exact sum; merge them one by one.")
        for adapter in adapters:
            check_none_saved(self.model, adapter)
        strengths = [one_strength(a, unique_coordinates(self.model, a).values()) for a in adapters]
        config = SubspaceConfig.from_peft_type(**{**configs[0].to_dict(), "inference_mode": False})
        self.peft_config[adapter_name] = config
        try:
            self.inject_adapter(self.model, adapter_name)
        except BaseException:
            del self.peft_config[adapter_name]
            raise
        theta_d = getattr(self.model, VECTORS).subspace_peft_theta_d
        terms = zip(adapters, weights, strengths, strict=True)
        with torch.no_grad():
            theta_d[adapter_name].copy_(sum(float(w) * strength * theta_d[a] for a, w, strength in terms))

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        """Hand `adapter_names`, the adapter of each sample, from the model's forward to its layers and to the modules
        that are saved whole."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("`adapter_names` needs a model in evaluation mode, got training mode; call model.eval().")
        unknown = set(names) - set(self.peft_config) - {"__base__"}
        if unknown:
            raise ValueError(
                f"`adapter_names` must name adapters of the model or '__base__', got the non-existing adapter(s) "
                f"{', '.join(sorted(unknown))}; add them first."
            )
        layers = {n: m for n, m in self.model.named_modules(remove_duplicate=False) if isinstance(m, SubspaceLayer)}
        with handing_over(self.model, layers, list(names), args, kwargs):
            yield

    def _check_merge_allowed(self) -> None:
        """As in PEFT, and that no tensor is sharded, before the first is merged."""
        super()._check_merge_allowed()
        for layer in self._layers():
            merging.check_whole(layer)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        merging.check_known("adapter_names", adapter_names, self.peft_config)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(self, merge=True, progressbar=False, safe_merge=False, adapter_names=None):
        merging.check_known("adapter_names", adapter_names, self.peft_config)
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        unload_inside(model, merge, safe_merge, adapter_names)
        if hasattr(model, VECTORS):
            remove_vectors(model)
        if merge:
            quantised.forget(model)
        return model

    # --------------------------------------------------------------------------------------------- the adapter's file

    def __getattr__(self, name: str):
        """As in PEFT, which asks for the embeddings to save them; but where a base raises an error it has none."""
        attribute = super().__getattr__(name)
        return partial(embeddings, self.model, name) if name in EMBEDDINGS else attribute

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        selected = adapter_file.select(model, config, adapter_name, state_dict)
        return {uncompiled(key): tensor for key, tensor in selected.items()}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key_in_file(key.removesuffix(f".{adapter_name}"))

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        remapped = adapter_file.remap(model, config, adapter_name, state_dict)
        keys = {uncompiled(key): key for key in model.state_dict()}
        return {keys.get(uncompiled(key), key): tensor for key, tensor in remapped.items()}
