"""A model with several adapters of different kinds."""

from __future__ import annotations

from peft import PeftModel
from torch import Tensor

from tests.cases import Case, move, outputs, settings, wrap


ADAPTERS = {
    "one": {"d": 7, "seed": 1},
    "two": {"d": 5, "seed": 2, "projection": "sparse"},
    "three": {"d": 9, "seed": 2, "projection": "dense", "target_modules": ["fc2", "head"]},
    "low": {"d": 6, "coordinates": "low_rank", "rank": 2, "parameters": ["weight"]},
}


def several(case: Case) -> PeftModel:
    """The case's model with all ADAPTERS, each moved, the first one active."""
    names = list(ADAPTERS)
    model = wrap(case, names[0], **ADAPTERS[names[0]])
    for name in names[1:]:
        model.add_adapter(name, settings(**ADAPTERS[name]))
    for i, name in enumerate(names):
        move(model, name, size=0.3, seed=i)
    return model.eval()


def alone(case: Case, name: str) -> Tensor:
    """The outputs of the case's model with this adapter and no other."""
    model = wrap(case, name, **ADAPTERS[name])
    move(model, name, size=0.3, seed=list(ADAPTERS).index(name))
    return outputs(model, case)
