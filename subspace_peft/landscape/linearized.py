"""A network as a linear function of its weights, its tangent at a point (Larsen et al. 2021, appendix A.1)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, nn
from torch.func import functional_call, jvp


def linearized(model: nn.Module, at: Mapping[str, Tensor] | None = None) -> Linearized:
    """The network linearised at w*:

        f_lin(x; w) = f(x; w*) + J(x; w*) (w - w*),    J = df/dw.

    The result is a module with parameters of the same names, which start at the weights of `model`. It is therefore
    wrapped and trained like `model`, in the same subspace for the same seed, and adapters of the one load onto the
    other. Buffers keep their values at w* and the network is in eval mode: batch norm uses the statistics at w*.

    Args:
        model: A network whose output is one tensor. torch must have forward-mode derivatives of all its operations; it
            lacks them for recurrent layers and for fused ones, such as the fast path of nn.TransformerEncoder. The
            model is not changed.
        at: w*, a state dict of the model; its present weights if left out.

    Raises:
        RuntimeError: from `load_state_dict`, if `at` is of another model.
    """
    point = copy.deepcopy(model)
    if at is not None:
        point.load_state_dict(at)
    return Linearized(model, point.eval().requires_grad_(False))


class Linearized(nn.Module):
    """See `linearized`. Its submodules have the names of the network's and hold only parameters.

    Args:
        model: The network with the initial w.
        point: The same network at w*, frozen.
    """

    def __init__(self, model: nn.Module, point: nn.Module):
        super().__init__()
        object.__setattr__(self, "_point", point)  # unregistered, so that it is neither adapted nor saved
        _copy_parameters(self, model, {})

    def _apply(self, fn: Callable, recurse: bool = True):
        self._point._apply(fn)
        return super()._apply(fn, recurse)

    def forward(self, *args, **kwargs) -> Tensor:
        weights = dict(_named_tensors(self))
        at = dict(self._point.named_parameters())
        tangents = {name: weights[name] - w for name, w in at.items()}

        def network(w: dict[str, Tensor]) -> Tensor:
            output = functional_call(self._point, w, args, kwargs)
            if not isinstance(output, Tensor):
                raise TypeError(
                    f"`linearized` needs a model whose output is one tensor, got {type(output).__name__}; wrap the "
                    "model in a module that returns its logits."
                )
            return output

        value, change = jvp(network, (at,), (tangents,))
        return value + change


class Weights(nn.Module):
    """Returns the parameters of a module by name when it is called, so that an adapter around it can replace them."""

    def __init__(self, module: nn.Module, copies: dict[int, nn.Parameter]):
        super().__init__()
        _copy_parameters(self, module, copies)

    def forward(self) -> dict[str, Tensor]:
        return dict(_named_tensors(self))


def _copy_parameters(holder: nn.Module, module: nn.Module, copies: dict[int, nn.Parameter]) -> None:
    """Give `holder` copies of the parameters of `module` and its submodules; tied parameters stay tied."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            if id(parameter) not in copies:
                copies[id(parameter)] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            holder.register_parameter(name, copies[id(parameter)])
    holder._parts = [name for name, child in module._modules.items() if child is not None]
    for name in holder._parts:
        holder.add_module(name, Weights(module._modules[name], copies))


def _named_tensors(holder: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters of `holder`, through `_parts` only, because PEFT adds modules of its own."""
    for name in holder._parameters:
        yield name, getattr(holder, name)
    for part in holder._parts:
        for name, tensor in holder._modules[part]().items():
            yield f"{part}.{name}", tensor
