"""SubspaceVectors: theta_d of every adapter, the one thing that trains."""

from __future__ import annotations

from accelerate.utils import align_module_device
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..plain_model import whole
from ..projections import JointCache


class SubspaceVectors(AuxiliaryTrainingWrapper):
    """theta_d of every adapter of a model, and the scales that normalise their P.

    A child of the base model, to which layers hold an unregistered reference: the vector has one owner and one name in
    the state dict, whichever modules it moves. To PEFT it is what `modules_to_save` is, something trained beside its
    layers, since as a tuner layer it would have to be merged and converted to LoRA.
    """

    adapter_layer_names = ("subspace_peft_theta_d",)
    other_param_names = adapter_layer_names  # by this PEFT tells them from the base's own parameters

    def __init__(self, adapter: str):
        super().__init__(nn.Identity(), adapter)

    def init_modules(self, adapter_name: str) -> None:
        self.subspace_peft_theta_d = nn.ParameterDict()
        self.scales: dict[str, Tensor | float | None] = {}
        self.joint_caches: dict[str, JointCache | None] = {}

    def add(
        self, adapter: str, theta_d: Tensor, scale: Tensor | float | None, joint_cache: JointCache | None = None
    ) -> None:
        self.update(adapter)
        self.subspace_peft_theta_d[adapter] = nn.Parameter(theta_d)
        self.scales[adapter], self.joint_caches[adapter] = scale, joint_cache

    def normalised(self, adapter: str) -> Tensor:
        """z, the theta_d that the unnormalised P is applied to. [d]"""
        theta_d, scale = whole(self.subspace_peft_theta_d[adapter]), self.scales[adapter]  # between two forwards too
        if scale is None:
            raise ValueError(
                f"The basis or mask of adapter {adapter!r} must come with its file, and was not read: transformers' "
                "own load_adapter and from_pretrained take theta_d alone; use PeftModel.from_pretrained(model, dir)."
            )
        if theta_d.device.type == "meta":  # offloaded by accelerate: loaded for a forward of its own only
            with align_module_device(self.subspace_peft_theta_d):
                theta_d = self.subspace_peft_theta_d[adapter].clone()
        if isinstance(scale, Tensor) and scale.device != theta_d.device:
            scale = self.scales[adapter] = scale.to(theta_d.device)
        if (joint_cache := self.joint_caches[adapter]) and (z := joint_cache.normalised(theta_d, scale)) is not None:
            return z
        return theta_d if isinstance(scale, float) and scale == 1 else theta_d * scale

    def forward(self, *args):
        """Identity, for base models that run all their children in turn (nn.Sequential)."""
        return args[0] if len(args) == 1 else args

    # What follows is PEFT's protocol. Which vectors train is set by the layers, as for every tuner.

    def _get_available_adapters(self) -> set[str]:
        return set(self.subspace_peft_theta_d.keys())

    def check_set_adapter(self, adapter_name: str | list[str]) -> str | None:
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        return next((name for name in names if name in self._adapters), None)

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None) -> None:
        self._adapters.discard(adapter_name)
        self.scales.pop(adapter_name, None)
        self.joint_caches.pop(adapter_name, None)
        if adapter_name in self.subspace_peft_theta_d:
            del self.subspace_peft_theta_d[adapter_name]
        self._active_adapter = [name for name in new_active_adapters or () if name in self._adapters]

    # adapter_file saves and loads. transformers finds theta_d by its prefix; listed here, it would be renamed twice.

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        return {}

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        return {}

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: list[str] | None):
        return self.original_module
