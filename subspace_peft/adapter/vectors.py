"""SubspaceVectors: theta_d of every adapter of a model."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from accelerate.utils import align_module_device
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..plain_model import HasSubstitutes, has_other_processes, whole
from ..projections import JointCache
from ..projections.recorded import uncounted
from .forming import is_in_backward
from .renaming import UNCHANGED, Renaming


PREFIX = "subspace_peft_"
"""Begins the name of every parameter and buffer of an adapter; PEFT tells them from the base's by it."""

VECTORS = "subspace_vectors"
"""The child of the base model that holds theta_d. PEFT passes over modules whose name contains the prefix."""


class ThetaD(nn.ModuleDict):
    """theta_d of each adapter: `[adapter]` gives the parameter, `items()` and `values()` the module that holds it.

    That module has the adapter's name, and the parameter is called `...theta_d.default.vector`: trainers that copy an
    adapter look for its name between two dots, where LoRA's parameters have it.
    """

    def __getitem__(self, adapter: str) -> nn.Parameter:
        return super().__getitem__(adapter)["vector"]

    def __setitem__(self, adapter: str, vector: Tensor) -> None:
        """Put a vector in the place of another, which trains if that did, or add it."""
        if adapter not in self:
            super().__setitem__(adapter, nn.ParameterDict())
        elif not isinstance(vector, nn.Parameter):
            vector = nn.Parameter(vector.detach(), self[adapter].requires_grad)
        super().__getitem__(adapter)["vector"] = vector

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """As in torch, and from state dicts of before theta_d was in a module of its own."""
        for key in [prefix + adapter for adapter in self if prefix + adapter in state_dict]:
            state_dict[f"{key}.vector"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Renames(dict):
    """Keys and what transformers' load_adapter renames them to.

    transformers asks for the items. PEFT iterates, to rename keys that the file must then hold; it finds none here,
    since `remap` names them.
    """

    def __iter__(self):
        return iter(())


def check_adapter_name(adapter: str, saved_whole: Iterable[str]) -> None:
    """Check a name before torch and PEFT take it for something else.

    Args:
        saved_whole: The names of modules that are saved whole, which PEFT looks for at the end of every module's name.

    Raises:
        ValueError: if they would.
    """
    taken = not adapter or "." in adapter or adapter in (VECTORS, "vector") or hasattr(nn.ModuleDict(), adapter)
    ending = next((name for name in saved_whole if adapter.endswith(name)), None)
    if taken or ending:
        rule = "be empty, contain a dot, or be a name that modules use already"
        rule = f"end in {ending!r}, by which PEFT finds a module that is saved whole" if ending else rule
        raise ValueError(f"The name of an adapter must not {rule}, got {adapter!r}; choose another name.")


def _without_reentrant_checkpoints(z: Tensor) -> Tensor:
    """z for a forward that runs anew in a backward pass, of which no backward pass of its own may compute a gradient.

    Reentrant checkpoints do that: each adds to the gradient of theta_d, when the processes may have averaged it.
    """
    recomputing = torch._C._current_graph_task_id()

    def check(grad: Tensor) -> None:
        if torch._C._current_graph_task_id() != recomputing:
            raise ValueError(
                "Gradient checkpoints must not be reentrant where several processes train theta_d: they would average "
                "its gradient before all layers have added to it; set `use_reentrant=False`."
            )

    z = z.view_as(z)
    z.register_hook(check)
    return z


class SubspaceVectors(HasSubstitutes, AuxiliaryTrainingWrapper):
    """theta_d of every adapter of a model, the scales that normalise their P, and the names that P is drawn from.

    It is a child of the base model, and layers hold an unregistered reference to it: theta_d has one owner and one
    name in the state dict, whichever modules it moves. PEFT treats it as one of `modules_to_save`, trained beside the
    layers, because PEFT would merge a tuner layer and convert it to LoRA.
    """

    adapter_layer_names = ("subspace_peft_theta_d",)
    other_param_names = adapter_layer_names  # PEFT leaves these out of the base's state dict

    def __init__(self, adapter: str, float_dtype: torch.dtype = torch.float32):
        super().__init__(nn.Identity(), adapter)
        self.float_dtype = float_dtype

    def init_modules(self, adapter_name: str) -> None:
        self.subspace_peft_theta_d = ThetaD()
        self.scales: dict[str, Tensor | float | None] = {}
        self.joint_caches: dict[str, JointCache | None] = {}
        self.renamings: dict[str, Renaming] = {}
        self.forwards = 0  # of the base model, so far

    def add(
        self,
        adapter: str,
        theta_d: Tensor,
        scale: Tensor | float | None,
        joint_cache: JointCache | None = None,
        renaming: Renaming = UNCHANGED,
    ) -> None:
        """Add an adapter; its scale is None until its basis or mask is read from its file."""
        self.update(adapter)
        self.subspace_peft_theta_d[adapter] = nn.Parameter(theta_d)
        self.scales[adapter], self.joint_caches[adapter], self.renamings[adapter] = scale, joint_cache, renaming

    @uncounted
    def normalised(self, adapter: str) -> Tensor:
        """z = theta_d times the scale, so that P z with the unnormalised P is P theta_d with the normalised one: [d].

        Raises:
            ValueError: if the adapter's basis or mask was not read; in a reentrant checkpoint, with several processes.
        """
        theta_d, scale = whole(self.subspace_peft_theta_d[adapter]), self.scales[adapter]  # also between two forwards
        if scale is None:
            raise ValueError(
                f"The basis or mask of adapter {adapter!r} must come with its file, but was not read: transformers' "
                "load_adapter and from_pretrained read theta_d alone; use PeftModel.from_pretrained(model, folder)."
            )
        if theta_d.device.type == "meta":  # accelerate offloaded it and loads it only for this module's own forward
            with align_module_device(self.subspace_peft_theta_d.get_submodule(adapter)):
                theta_d = self.subspace_peft_theta_d[adapter].clone()
        if self.substitute is not None:
            theta_d = self.substitute(adapter, theta_d)
        if isinstance(scale, Tensor) and scale.device != theta_d.device:
            scale = self.scales[adapter] = scale.to(theta_d.device)
        joint_cache = self.joint_caches[adapter]
        z = joint_cache.normalised(theta_d, scale) if joint_cache else None
        if z is None:
            z = theta_d if isinstance(scale, float) and scale == 1 else theta_d * scale
        trains = z.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return _without_reentrant_checkpoints(z) if trains and is_in_backward() and has_other_processes() else z

    def forward(self, *args):
        """The identity: a base model may run all its children in turn, as nn.Sequential does."""
        return args[0] if len(args) == 1 else args

    # PEFT's protocol. The layers set which vectors train, as in every tuner.

    def _get_available_adapters(self) -> set[str]:
        return set(self.subspace_peft_theta_d.keys())

    def check_set_adapter(self, adapter_name: str | list[str]) -> str | None:
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        return next((name for name in names if name in self._adapters), None)

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None) -> None:
        self._adapters.discard(adapter_name)
        self.scales.pop(adapter_name, None)
        self.joint_caches.pop(adapter_name, None)
        self.renamings.pop(adapter_name, None)
        if adapter_name in self.subspace_peft_theta_d:
            del self.subspace_peft_theta_d[adapter_name]
        self._active_adapter = [name for name in new_active_adapters or () if name in self._adapters]

    # file.py saves and loads theta_d. transformers finds its key by the prefix and appends the adapter's name.

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        return {}

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        name = self.adapter_layer_names[0]
        return _Renames({rf"{name}\.{re.escape(adapter_name)}": f"{name}.{adapter_name}.vector"})

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: list[str] | None):
        return self.original_module
