"""Base modules: those of a model as if it had no adapter, and the parameters that they own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer, _ExcludedModule, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from ..plain_model import COMPILED, shape_of
from .config import OF_ONE_DIMENSION
from .layer import SubspaceLayer


def base_modules(model: nn.Module, saved: bool = False) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """Every module as if the model had no adapter: its name, its parent, its name in the parent, the module.

    Args:
        saved: Whether those are among them that other adapters hold copies of, in `modules_to_save`.

    Raises:
        ValueError: if a module already has an adapter of another PEFT method.
    """

    def visit(prefix: str, parent: nn.Module):
        for child, module in parent._modules.items():  # named_children leaves out a module's second name
            name = prefix if child == COMPILED else f"{prefix}.{child}" if prefix else child
            if saved and isinstance(module, ModulesToSaveWrapper):
                module = module.original_module
            if module is None or isinstance(module, AuxiliaryTrainingWrapper):
                continue
            if isinstance(module, SubspaceLayer):
                module = module.base_layer
            elif isinstance(module, BaseTunerLayer):
                raise ValueError(
                    f"A module can hold adapters of one PEFT type: `{name}` is already a {type(module).__name__}; "
                    "unload that adapter first."
                )
            if name and COMPILED not in module._modules:  # a compiled module goes by the one inside
                yield name, parent, child, module
            yield from visit(name, module)

    yield from visit("", model)


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a module owns directly, by their name in it."""
    return dict(module.named_parameters(recurse=False, remove_duplicate=False))


def owned_or_read(
    name: str, modules: dict[str, nn.Module], config: PeftConfig, rename: Callable[[str], str]
) -> dict[str, nn.Parameter]:
    """The parameters of the module of this name, by their path in it.

    Torch's attention reads those of its `out_proj` and never calls that child, so a config that names it means them
    too, unless the config excludes them.

    Args:
        modules: The base modules by name.
        rename: The name by which the config calls a tensor or module of this name.
    """
    module, output = modules[name], f"{name}.out_proj"
    owned = own_parameters(module)
    is_read = isinstance(module, nn.MultiheadAttention) and output in modules
    if is_read and not isinstance(check_target_module_exists(config, rename(output)), _ExcludedModule):
        owned |= {f"out_proj.{path}": parameter for path, parameter in own_parameters(modules[output]).items()}
    return owned


def computed_from(name: str, module: nn.Module) -> list[str]:
    """The names of the modules that hold what parameters of this one are computed from (torch's parametrize)."""
    lists = module.parametrizations if is_parametrized(module) else {}
    return [f"{name}.parametrizations.{parameter}" for parameter in lists]


def asked_for(path: str, parameter: Tensor, config: PeftConfig) -> bool:
    """Whether the config asks for a parameter of this name where it asks for its module."""
    if config.parameters == OF_ONE_DIMENSION:
        return is_lazy(parameter) or len(shape_of(parameter)) == 1  # a lazy one is refused by name
    return config.parameters is None or path in config.parameters
