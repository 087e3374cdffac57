"""Fingerprints: the digits by which an adapter's files recognise their base model, and each other."""

import pytest
import torch

from subspace_peft import SubspaceConfig
from subspace_peft.adapter.fingerprint import check_fingerprint, fingerprint, mark


SHAPES = {"a.weight": (2, 3), "a.bias": (2,), "b.weight": (4, 2)}


def test_eight_digits_for_each_tensor_in_order():
    digits = fingerprint(SHAPES)
    assert len(digits) == 8 * 3
    assert digits == "".join(fingerprint({name: shape}) for name, shape in SHAPES.items())
    assert fingerprint(dict(reversed(SHAPES.items()))) != digits
    check_fingerprint(digits, SHAPES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a.bias": (3,)}, "differs is `a.bias` of shape \\[3\\] \\(of 3 target tensors there and 3 here\\)"),
        ({"b.weight": None}, "this model ends after `a.bias`, the adapter's base had 1 more \\(of 3 .* and 2 here\\)"),
        ({"c.weight": (1,)}, "differs is `c.weight` of shape \\[1\\] \\(of 3 target tensors there and 4 here\\)"),
    ],
    ids=["shape", "fewer", "more"],
)
def test_the_first_tensor_that_differs_is_named(changes, message):
    shapes = {name: shape for name, shape in {**SHAPES, **changes}.items() if shape is not None}
    with pytest.raises(ValueError, match=message):
        check_fingerprint(fingerprint(SHAPES), shapes)


def test_the_mark_of_older_files_stays():
    """A field that was added later counts only where it differs from its default."""
    config = SubspaceConfig(d=3, coordinates="low_rank", rank=2)
    assert mark(config).dtype == torch.int64
    assert torch.equal(mark(config), mark(SubspaceConfig(d=3, coordinates="low_rank", rank=2, factors=2, gamma=None)))
    for changes in ({"seed": 1}, {"factors": 3}, {"replace_weight": True}, {"normalization": "columns"}):
        other = SubspaceConfig(**{"d": 3, "coordinates": "low_rank", "rank": 2, **changes})
        assert not torch.equal(mark(config), mark(other))
