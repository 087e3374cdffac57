"""Undo: whatever fails while a model is wrapped leaves it as it was."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


MUTABLE = (dict, OrderedDict, list, set)


@contextmanager
def undone_if_it_fails(model: nn.Module) -> Iterator[None]:
    """If the block raises, every module of the model has again the attributes that it had, and what they held.

    Tensors are not copied: wrapping writes into none.
    """
    modules = [(module, module.__class__, *_attributes(module)) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for module, kind, attributes, contents in modules:
            module.__class__ = kind
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for container, content in contents:
                container.clear()
                container.extend(content) if isinstance(container, list) else container.update(content)
        for parameter, requires_grad in trained:
            parameter.requires_grad = requires_grad  # a lazy one has no requires_grad_
        raise


def _attributes(module: nn.Module) -> tuple[dict, list[tuple]]:
    attributes = dict(module.__dict__)
    return attributes, [(value, value.copy()) for value in attributes.values() if type(value) in MUTABLE]
