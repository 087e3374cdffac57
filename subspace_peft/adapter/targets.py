"""Targets: which tensors of a model are theta, found and checked before anything is touched."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import TaskType
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .layer import SubspaceLayer


ALL = "all"


@dataclass(frozen=True)
class Target:
    """One module to adapt: where it hangs, and which of its parameters are theta."""

    parent: nn.Module
    child: str
    module: nn.Module
    tensors: dict[str, str]  # path inside the module -> name of the tensor in the base model
    shared: frozenset[str]  # the paths whose tensor an earlier target holds too

    @property
    def layer(self) -> nn.Module:
        """What hangs there now: the module, or the SubspaceLayer around it."""
        return self.parent._modules[self.child]


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """Every module of the base model as if no adapter were there: name, parent, child name, module.

    Raises:
        ValueError: where another PEFT method has already taken a module.
    """

    def visit(prefix: str, parent: nn.Module):
        for child, module in parent._modules.items():  # named_children leaves out a module's second name
            name = f"{prefix}.{child}" if prefix else child
            if module is None or isinstance(module, AuxiliaryTrainingWrapper):
                continue
            if isinstance(module, SubspaceLayer):
                module = module.base_layer
            elif isinstance(module, BaseTunerLayer):
                raise ValueError(
                    f"A module can hold adapters of one PEFT type: `{name}` is already a {type(module).__name__}; "
                    "unload that adapter first."
                )
            yield name, parent, child, module
            yield from visit(name, module)

    yield from visit("", model)


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a module owns directly, by their path inside it.

    nn.MultiheadAttention reads those of its `out_proj` itself and never calls it: they are its own.
    """
    owned = dict(module.named_parameters(recurse=False, remove_duplicate=False))
    if isinstance(module, nn.MultiheadAttention):
        owned |= {f"out_proj.{name}": parameter for name, parameter in module.out_proj.named_parameters(recurse=False)}
    return owned


def expand_all(model: nn.Module) -> set[str]:
    """The names of the modules that own parameters, for target_modules="all"."""
    stray = [name for name, _ in model.named_parameters(recurse=False)]
    if stray:
        raise ValueError(
            f'target_modules="all" needs every parameter to lie in a submodule; the model itself owns {stray}; wrap '
            "the model in another module, or name the target modules."
        )
    return {
        name
        for name, parent, child, module in base_modules(model)
        if own_parameters(module) and not (isinstance(parent, nn.MultiheadAttention) and child == "out_proj")
    }


def expand_all_linear(model: nn.Module, config: PeftConfig) -> set[str]:
    """The names that PEFT's "all-linear" stands for, whether or not an adapter is there already.

    Linear and Conv1D, but not the output embedding, nor the head of a sequence classifier.
    """
    heads = set()
    if isinstance(model, PreTrainedModel):
        heads = {model.get_output_embeddings()}
        if heads == {None} and config.task_type == TaskType.SEQ_CLS:
            heads = {next((getattr(model, name) for name in SEQ_CLS_HEAD_NAMES if hasattr(model, name)), None)}
    heads = {head.base_layer if isinstance(head, SubspaceLayer) else head for head in heads}
    return {
        name
        for name, _, _, module in base_modules(model)
        if isinstance(module, (nn.Linear, Conv1D)) and module not in heads
    }


def find_targets(model: nn.Module, config: PeftConfig, matches: Callable[[str], bool]) -> list[Target]:
    """The modules that the config names, those that share a tensor with them, and those that keep statistics.

    Raises:
        ValueError: if a named module owns no parameters, or none of `config.parameters`, or holds them quantised.
    """
    modules = list(base_modules(model))
    chosen = _chosen_paths(modules, config, matches)
    canonical = {}
    for name, _, _, module in modules:
        for path, parameter in own_parameters(module).items():
            canonical.setdefault(id(parameter), f"{name}.{path}")
    tensors = {id(own_parameters(module)[path]) for name, _, _, module in modules for path in chosen.get(name, ())}

    targets, held, places = [], set(), set()
    for name, parent, child, module in modules:
        if (isinstance(parent, nn.MultiheadAttention) and child == "out_proj") or (id(parent), child) in places:
            continue
        places.add((id(parent), child))
        mine = {path: p for path, p in own_parameters(module).items() if id(p) in tensors}
        if mine or (_keeps_statistics(module) and not _saved_whole(name, config)):
            shared = set()
            for path, p in mine.items():
                if id(p) in held:
                    shared.add(path)
                held.add(id(p))
            names = {path: canonical[id(p)] for path, p in mine.items()}
            targets.append(Target(parent, child, module, names, frozenset(shared)))
    return targets if tensors else []


def _saved_whole(name: str, config: PeftConfig) -> bool:
    """Whether the module is, or lies in, one of `modules_to_save`, whose copy has statistics of its own."""
    return any(re.match(rf"(^|.*\.){saved}($|\..*)", name) for saved in config.modules_to_save or ())


def _keeps_statistics(module: nn.Module) -> bool:
    return getattr(module, "running_mean", None) is not None and getattr(module, "running_var", None) is not None


def _chosen_paths(modules, config: PeftConfig, matches: Callable[[str], bool]) -> dict[str, list[str]]:
    """For each module that the config names, the paths of the parameters that are theta."""
    chosen, empty, known = {}, [], set()
    for name, parent, child, module in modules:
        if not matches(name):
            continue
        owned = own_parameters(module)
        known |= set(owned)
        wanted = list(owned)
        if config.parameters is not None:
            wanted = [path for path in owned if path in config.parameters]
        if isinstance(parent, nn.MultiheadAttention) and child == "out_proj":
            name = name.removesuffix(".out_proj")
            wanted = [f"out_proj.{path}" for path in wanted]
            owned = own_parameters(parent)
        if wanted and getattr(module, "max_norm", None) is not None:
            raise ValueError(
                f"A target must leave its weight alone: the embedding `{name}` rewrites its own by `max_norm`; set "
                "that to None or exclude the module."
            )
        for path in wanted:
            if not owned[path].is_floating_point():
                raise ValueError(
                    f"A target tensor must be of a floating dtype: `{name}.{path}` is {owned[path].dtype}, a "
                    "quantised weight; load the model unquantised, or leave the module out with `exclude_modules`."
                )
        if wanted:
            chosen[name] = chosen.get(name, []) + wanted
        else:
            empty.append(name)
    if empty and (not chosen or _named_exactly(config, empty)):
        what = "parameters" if config.parameters is None else f"parameters named {sorted(config.parameters)}"
        raise ValueError(
            f"A target module must own {what}: `{empty[0]}` owns none; name modules that do, or use "
            'target_modules="all".'
        )
    _check_parameters(config, known)
    return chosen


def _check_parameters(config: PeftConfig, known: set[str]) -> None:
    """Of a new adapter: a saved one is held to its fingerprint."""
    unknown = sorted(set(config.parameters or ()) - known)
    if not unknown or not known or config.expected_fingerprint is not None:
        return
    near = difflib.get_close_matches(unknown[0], sorted(known), 3, 0.5) or sorted(known)[:3]
    raise ValueError(
        f"`parameters` must name parameters that a target owns, none owns `{unknown[0]}`; names near to it: "
        f"{', '.join(near)}."
    )


def _named_exactly(config: PeftConfig, names: list[str]) -> bool:
    return not isinstance(config.target_modules, str) and bool(set(names) & set(config.target_modules or ()))


def near_names(model: nn.Module, config: PeftConfig) -> list[str]:
    """Names of modules that resemble those asked for and not found."""
    names = {name for name, *_ in base_modules(model)} | {child for _, _, child, _ in base_modules(model)}
    asked = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules or ()
    return sorted({near for target in asked for near in difflib.get_close_matches(target, names, 3, 0.5)})


def fingerprint(shapes: dict[str, tuple[int, ...]]) -> str:
    """Eight hexadecimal digits for the (name, shape) of each target tensor, in their order."""
    return "".join(
        blake2b(f"{name} {list(shape)}".encode(), digest_size=4).hexdigest() for name, shape in shapes.items()
    )


def check_fingerprint(expected: str, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises ValueError, naming the first tensor that differs, if the adapter was trained on another base."""
    found = fingerprint(shapes)
    if found == expected:
        return
    first = next(
        (i for i in range(0, max(len(found), len(expected)), 8) if found[i : i + 8] != expected[i : i + 8]), 0
    )
    names = list(shapes)
    if first // 8 < len(names):
        name = names[first // 8]
        what = f"the first target tensor that differs is `{name}` of shape {list(shapes[name])}"
    else:
        what = f"this model ends after `{names[-1]}`, the adapter's base had {len(expected) // 8 - len(names)} more"
    raise ValueError(
        f"An adapter must be loaded onto the base model it was trained on: {what} (of {len(expected) // 8} tensors "
        f"there and {len(names)} here); load the right base model, or train a new adapter."
    )
