"""The features of a model's layers over a data loader, by forward hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..evaluation import evaluating, moved, run
from .features import ClassFeatures


def first_tensor(output: Any) -> Tensor:
    """The output of a layer, or the first tensor in it if it is a tuple, list, dictionary or ModelOutput."""
    while not isinstance(output, Tensor):
        if isinstance(output, Mapping):
            output = tuple(output.values())
        if not isinstance(output, (tuple, list)) or not output:
            raise ValueError(f"A layer must return a tensor first, got {type(output).__name__}; pass `read`.")
        output = output[0]
    return output


@torch.no_grad()
def class_features(
    model: nn.Module,
    batches: Iterable,
    layers: Iterable[str],
    inputs: bool = False,
    read: Callable[[Any], Tensor] = first_tensor,
) -> dict[str, ClassFeatures]:
    """The class means and spreads of the outputs of these layers, in one pass over a data loader, in eval mode.

        D_l = tr Sigma_W / tr Sigma_B,    S_l = 1 - max_{k != k'} |<mu_k, mu_k'>| / (|mu_k| |mu_k'|)

    are `.compression` and `.separation` of each (Qu's slides, after He and Su 2022, Tirer et al. 2022). Only samples
    of this process count; features are flattened. Hooks are removed and the modes of the model restored afterwards.

    Args:
        batches: Pairs (inputs, labels), inputs a tensor, a tuple of arguments or a dictionary of them; or dictionaries
            with "labels". They are moved to the model's device.
        layers: Names of modules, as in `named_modules` of the model, or of the base model of a PeftModel.
        inputs: Use the first argument of the layers instead of their output.
        read: Turns the output into [B, ...], one sample a row; for example `lambda output: output[0].mean(1)` averages
            over tokens.

    Raises:
        ValueError: if a layer is unknown, or does not run exactly once a batch, or features and labels do not fit.
    """
    modules, names = dict(model.named_modules(remove_duplicate=False)), list(layers)
    modules = {name.removeprefix("base_model.model."): module for name, module in modules.items()} | modules
    for name in names:
        if name not in modules:
            raise ValueError(f"`layers` must be modules of the model, {name!r} is none of {', '.join(modules)[:500]}.")
    features = {name: ClassFeatures() for name in names}
    device = next((parameter.device for parameter in model.parameters()), None)
    with evaluating(model), _hooked({name: modules[name] for name in names}, inputs, read) as outputs:
        for batch in batches:
            outputs.clear()
            arguments, labels = _split(batch)
            run(model, moved(arguments, device))
            for name in names:
                if len(outputs.get(name, ())) != 1:
                    raise ValueError(
                        f"A layer must run exactly once a batch to have features, {name!r} ran "
                        f"{len(outputs.get(name, ()))} times; name another."
                    )
                features[name].add(outputs[name][0], labels)
    return features


@contextlib.contextmanager
def _hooked(modules: dict[str, nn.Module], inputs: bool, read: Callable[[Any], Tensor]) -> Iterator[dict[str, list]]:
    """What `read` made since the last clear, by module name; copies, because the next module may work in place."""
    outputs: dict[str, list] = {}

    def hook(name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any = None) -> None:
        value = (args[0] if args else next(iter(kwargs.values()))) if inputs else output
        outputs.setdefault(name, []).append(read(value).clone())

    handles = []
    try:
        for name, module in modules.items():
            register = module.register_forward_pre_hook if inputs else module.register_forward_hook
            handles.append(register(partial(hook, name), with_kwargs=True))
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _split(batch: Any) -> tuple[Any, Tensor]:
    if isinstance(batch, Mapping) and "labels" in batch:
        return {key: value for key, value in batch.items() if key != "labels"}, batch["labels"]
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    raise ValueError(
        f"A batch must be a pair (inputs, labels) or a dictionary with 'labels', got {type(batch).__name__}; wrap the "
        "loader in a generator of such batches."
    )
