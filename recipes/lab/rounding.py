"""Numbers of a few digits, for result files that people read too."""

from typing import Any

import torch


def digits(values: Any, n: int = 4) -> Any:
    """Tensors and lists as lists of numbers of n digits; NaN is null."""
    if isinstance(values, torch.Tensor):
        return digits(values.tolist(), n)
    if isinstance(values, (list, tuple)):
        return [digits(each, n) for each in values]
    return float(f"{values:.{n}g}") if values == values else None
