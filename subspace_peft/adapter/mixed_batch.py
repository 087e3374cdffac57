"""Mixed batch: a batch of which each sample runs with an adapter of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from . import statistics
from .forward import adapted


WAY_OUT = "run such a batch one adapter at a time, with set_adapter, or leave the module out of `target_modules`."


def groups(layer: BaseTunerLayer, names: list[str]) -> dict[tuple[str, ...], list[int]]:
    """The samples that run alike in this layer, by the adapters that they run with: "__base__" is none."""
    found: dict[tuple[str, ...], list[int]] = {}
    for i, name in enumerate(names):
        found.setdefault(tuple(layer.held([name])), []).append(i)
    return found


def is_mixed(layer: BaseTunerLayer) -> bool:
    """Whether the samples of the batch that runs move this module differently."""
    return layer.samples is not None and len(groups(layer, layer.samples)) > 1


def mixed_batch(layer: BaseTunerLayer, adapter_names: list[str], *args, **kwargs) -> Any:
    """The output of a SubspaceLayer, sample i with adapter `adapter_names[i]`; "__base__" stands for no adapter.

    Raises:
        ValueError: if an adapter is merged or disabled, or input or output cannot be split into samples.
    """
    if layer.merged or layer.disable_adapters:
        raise ValueError(
            "`adapter_names` needs adapters that are neither merged nor disabled; unmerge or enable them first."
        )
    parts = groups(layer, adapter_names)
    if len(parts) == 1:  # whatever its inputs are
        return _run(layer, *parts, *args, **kwargs)
    module = str(type(layer.base_layer))
    _check_samples(module, adapter_names, args, kwargs)
    output, (x, *others) = None, args
    for adapters, samples in parts.items():
        index = torch.tensor(samples, device=x.device)
        y = _run(layer, adapters, x.index_select(0, index), *others, **kwargs)
        if not isinstance(y, Tensor) or y.shape[0] != len(samples):
            raise ValueError(
                f"`adapter_names` needs outputs that can be split into samples along dimension 0, those of {module} "
                f"cannot; {WAY_OUT}"
            )
        output = y.new_empty(len(adapter_names), *y.shape[1:]) if output is None else output
        output = output.index_copy(0, index, y)
    return output


def _run(layer: BaseTunerLayer, adapters: tuple[str, ...], *args, **kwargs) -> Any:
    with statistics.using(layer, adapters[-1] if adapters else None):
        return adapted(layer, list(adapters), *args, **kwargs) if adapters else layer.base_layer(*args, **kwargs)


def _check_samples(module: str, names: list[str], args: tuple, kwargs: dict[str, Any]) -> None:
    tensors = [argument for argument in (*args, *kwargs.values()) if isinstance(argument, Tensor)]
    if len(tensors) != 1 or not args or tensors[0] is not args[0] or tensors[0].shape[:1] != (len(names),):
        shapes = [list(tensor.shape) for tensor in tensors]
        raise ValueError(
            f"`adapter_names` must have one name for each sample along dimension 0 of the input of {module}, got "
            f"{len(names)} names for inputs of shape {shapes}; {WAY_OUT}"
        )


class _Handing:
    """What is handed to the layers while a model runs.

    Args:
        layers: Each layer by its names in the model.
        beams: How often a beam search repeats each sample, but not in the encoder.
    """

    def __init__(self, model: nn.Module, layers: dict[str, BaseTunerLayer], names: list[str], beams: int):
        self.names, self.repeated = names, [name for name in names for _ in range(beams)]
        self.name_of = {layer: name.replace(".base_layer", "") for name, layer in layers.items()}
        self.arguments: dict[nn.Module, list[Tensor]] = {}  # of the last call of each module around an embedding
        self.around: dict[BaseTunerLayer, list[nn.Module]] = {}
        for name, layer in layers.items():
            if isinstance(layer.base_layer, (nn.Embedding, nn.EmbeddingBag)):
                parts = name.split(".")
                parents = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
                self.around.setdefault(layer, []).extend(parents)

    def note(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.arguments[module] = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]

    def to_layer(self, layer: BaseTunerLayer, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        names = self._fitting(args)
        if len(groups(layer, names)) > 1:
            _check_samples(f"`{self.name_of[layer]}`", names, args, kwargs)
            if not args[0].is_floating_point() and not self._is_of_samples(args[0], layer):
                raise ValueError(
                    f"`adapter_names` must split inputs by samples, but the integers for `{self.name_of[layer]}` may "
                    f"be positions: they are no input of the model, and there are {len(names)} of both; {WAY_OUT}"
                )
        return args, {**kwargs, "adapter_names": names}

    def to_saved(self, module: ModulesToSaveWrapper, args: tuple, kwargs: dict) -> tuple[tuple, dict[str, Any]]:
        """An adapter without a copy of the module uses the base's."""
        held = [name if name in module._adapters else "__base__" for name in self._fitting(args)]
        return args, {**kwargs, "adapter_names": held}

    def _fitting(self, args: tuple) -> list[str]:
        is_repeated = args and isinstance(args[0], Tensor) and args[0].shape[:1] == (len(self.repeated),)
        return self.repeated if is_repeated else self.names

    def _is_of_samples(self, x: Tensor, layer: BaseTunerLayer) -> bool:
        """Whether dimension 0 of integers is the batch, not positions of which there happen to be as many as samples.

        An argument of the model or of a module around the layer says so if x is a slice of it along the batch. So do
        all of them together if none has as many positions.
        """
        given = [t for module in self.around.get(layer, ()) for t in self.arguments.get(module, ()) if t.dim() > 1]
        return all(len(x) != t.shape[1] for t in given) or any(_is_slice(x, t) for t in given)


def _is_slice(x: Tensor, t: Tensor) -> bool:
    """Whether x is t, or a part of each sample of t."""
    same_memory = x.untyped_storage().data_ptr() == t.untyped_storage().data_ptr()
    if same_memory and len(x) == len(t) and x.stride(0) == t.stride(0):
        return True
    return x.shape == t.shape and torch.equal(x, t)


def _of_generate(kwargs: dict, name: str) -> int:
    """A number that `generate` is given, alone or in its config."""
    return kwargs.get(name) or getattr(kwargs.get("generation_config"), name, None) or 1


@contextmanager
def handing_over(
    model: nn.Module, layers: dict[str, BaseTunerLayer], names: list[str], args: tuple, kwargs: dict
) -> Iterator[None]:
    """Hand the adapter of each sample to the layers of a model and to the modules that are saved whole.

    Args:
        args, kwargs: What the model is called with.

    Raises:
        ValueError: if none of these has as many samples as there are names.
    """
    inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim()]
    sizes = {size for x in inputs for size in x.shape[: 2 if x.dim() > 2 else 1]}  # some put time before the batch
    returned = _of_generate(kwargs, "num_return_sequences")
    if inputs and len(names) not in sizes | {returned * size for size in sizes}:
        raise ValueError(
            f"`adapter_names` must have one name for each sample along dimension 0, got {len(names)} names for inputs "
            f"of shape {', '.join(str(list(x.shape)) for x in inputs)}; give as many names as there are samples."
        )
    handing = _Handing(model, layers, names, _of_generate(kwargs, "num_beams"))
    handing.note(model, args, kwargs)
    hooks = [(layer, handing.to_layer) for layer in handing.name_of]
    hooks += [(module, handing.to_saved) for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    hooks += [(module, handing.note) for module in set().union(*handing.around.values())]
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooks]
    for layer in handing.name_of:
        layer.samples = handing.repeated
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in handing.name_of:
            layer.samples = None
