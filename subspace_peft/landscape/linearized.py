"""A network as a linear function of its weights, its tangent at a point (Larsen et al. 2021, appendix A.1)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, nn
from torch.func import functional_call, jvp


def linearized(model: nn.Module, at: Mapping[str, Tensor] | None = None) -> Linearized:
    """The network linearised at w*:

        f_lin(x; w) = f(x; w*) + J(x; w*) (w - w*),    J = df/dw.

    It is a network in its own right. Its w starts at the weights of `model`, in parameters of the same names, so it is
    wrapped and trained as `model` is, in the same subspace for the same seed, and their adapters are exchangeable.
    Buffers stay as they are at w*, and the model in eval mode: batch norm has the statistics of w*.

    Args:
        model: Left as it is. Its output is one tensor, and torch has forward-mode derivatives of all its operations,
            which it lacks for recurrent layers and fused ones such as the fast path of nn.TransformerEncoder.
        at: w*, a state dict of the model; its present weights if left out.

    Raises:
        RuntimeError: if `at` is of another model, by `load_state_dict`.
    """
    point = copy.deepcopy(model)
    if at is not None:
        point.load_state_dict(at)
    return Linearized(model, point.eval().requires_grad_(False))


class Linearized(nn.Module):
    """See `linearized`. Its modules bear the names of the network's and hold parameters alone.

    Args:
        model: Has the w to start from.
        point: The network at w*, of the same architecture, frozen.
    """

    def __init__(self, model: nn.Module, point: nn.Module):
        super().__init__()
        object.__setattr__(self, "_point", point)  # unregistered: neither a target of adapters, nor saved
        _hold(self, model, {})

    def _apply(self, fn: Callable, recurse: bool = True):
        self._point._apply(fn)
        return super()._apply(fn, recurse)

    def forward(self, *args, **kwargs) -> Tensor:
        weights = dict(_held(self))
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
    """The parameters of a module, by name, when it is called: an adapter around it gives its own in their place."""

    def __init__(self, module: nn.Module, copies: dict[int, nn.Parameter]):
        super().__init__()
        _hold(self, module, copies)

    def forward(self) -> dict[str, Tensor]:
        return dict(_held(self))


def _hold(holder: nn.Module, module: nn.Module, copies: dict[int, nn.Parameter]) -> None:
    """Give `holder` copies of the parameters of `module` and of all its parts; tied ones stay tied."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            if id(parameter) not in copies:
                copies[id(parameter)] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            holder.register_parameter(name, copies[id(parameter)])
    holder._parts = [name for name, child in module._modules.items() if child is not None]
    for name in holder._parts:
        holder.add_module(name, Weights(module._modules[name], copies))


def _held(holder: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """By `_parts`, because PEFT hangs modules of its own beside these."""
    for name in holder._parameters:
        yield name, getattr(holder, name)
    for part in holder._parts:
        for name, tensor in holder._modules[part]().items():
            yield f"{part}.{name}", tensor
