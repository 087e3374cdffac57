"""Experts: the weights of a mixture of experts, which one module holds in stacks [experts, ., .].

The experts of many models were Linears once, and PEFT's users still call them by the names of those.
"""

from __future__ import annotations

from collections.abc import Callable

from peft import PeftConfig
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from torch import nn

from ..plain_model import shape_of
from .base_modules import asked_for, base_modules, own_parameters


FORMER_NAMES: dict[str, tuple[tuple[str, ...], ...]] = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "up_proj": (),
    "down_proj": (("w2",),),
}
"""A stacked weight -> the Linears that became it, by each way in which models named them."""


def is_experts(module: nn.Module) -> bool:
    """Whether the module owns a matrix for each of its `num_experts`."""
    count = getattr(module, "num_experts", None)
    shapes = map(shape_of, module.parameters(recurse=False))
    return count is not None and any(len(shape) == 3 and shape[0] == count for shape in shapes)


def routers(model: nn.Module) -> set[str]:
    """The names of the modules beside experts that hold one row of weights for each of them.

    "all-linear" takes them as it takes a router that is a Linear.
    """
    counts = {id(parent): module.num_experts for _, parent, _, module in base_modules(model) if is_experts(module)}
    found = set()
    for name, parent, _, module in base_modules(model):
        if (count := counts.get(id(parent))) is None:
            continue
        weight = own_parameters(module).get("weight")
        if weight is not None and len(shape_of(weight)) == 2 and shape_of(weight)[0] == count:
            found.add(name)
    return found


def kind_of(stack: str) -> str:
    """What the stack is in its Linears."""
    return "bias" if stack.endswith("bias") else "weight"


def stacked_parameters(
    model: nn.Module, config: PeftConfig, all_linear: bool, rename: Callable[[str], str]
) -> set[str]:
    """The names of the stacked weights and biases that `target_modules` stands for.

    It names their module, or the Linears that they were; "all-linear" stands for all of them. `parameters` and
    `exclude_modules` may call them by those names too, and each stack is the `weight` or `bias` of its Linears.

    Args:
        rename: The name by which the config calls a tensor or module of this name.

    Raises:
        ValueError: if only some of the Linears that became one stack are named.
    """
    found = set()
    for name, _, _, module in base_modules(model):
        if not is_experts(module):
            continue
        for path, parameter in own_parameters(module).items():
            is_asked_for = any(asked_for(each, parameter, config) for each in (path, kind_of(path)))
            if is_asked_for and _is_named(f"{name}.", path.removesuffix("_bias"), config, all_linear, rename):
                found.add(rename(f"{name}.{path}"))
    return found


def _is_named(module: str, stack: str, config: PeftConfig, all_linear: bool, rename: Callable[[str], str]) -> bool:
    def match(name: str):
        # a pattern may have the number of the expert before the name of its Linear
        matches = [check_target_module_exists(config, rename(f"{module}{expert}{name}")) for expert in ("", "0.")]
        excluded = next((match for match in matches if isinstance(match, _ExcludedModule)), None)
        return any(matches) if excluded is None else excluded

    whole = check_target_module_exists(config, rename(module.removesuffix(".")))
    groups = [{name: match(name) for name in group} for group in ((stack,), *FORMER_NAMES.get(stack, ()))]
    if any(isinstance(match, _ExcludedModule) for match in [whole, *(m for group in groups for m in group.values())]):
        return False
    if all_linear or whole or any(all(group.values()) for group in groups):
        return True
    for group in groups:
        if any(group.values()):
            named, missing = ([name for name in group if bool(group[name]) is there] for there in (True, False))
            raise ValueError(
                f"`target_modules` must name all Linears that became one parameter: {', '.join(group)} are "
                f"`{module}{stack}`, got {', '.join(named)} without {', '.join(missing)}; name both or neither."
            )
    return False
