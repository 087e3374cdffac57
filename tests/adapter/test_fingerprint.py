"""Fingerprints: the digits by which an adapter's files recognise their base model, and each other."""

import pytest
import torch

from subspace_peft import SubspaceConfig
from subspace_peft.adapter.fingerprint import check_fingerprint, check_mark, fingerprint, mark
from subspace_peft.coordinates.base import Shape


SHAPES = {"a.weight": Shape((2, 3)), "a.bias": Shape((2,)), "b.weight": Shape((4, 2))}
CONFIG = SubspaceConfig(projection="fastfood", d=3)


def test_eight_digits_for_each_tensor_in_order():
    digits = fingerprint(SHAPES)
    assert len(digits) == 8 * 3
    assert digits == "".join(fingerprint({name: shape}) for name, shape in SHAPES.items())
    assert fingerprint(dict(reversed(SHAPES.items()))) != digits
    check_fingerprint(digits, SHAPES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a.bias": Shape((3,))}, "differs is `a.bias` of shape \\[3\\] \\(of 3 target tensors there and 3 here\\)"),
        ({"b.weight": None}, "this model ends after `a.bias`, the adapter's base had 1 more \\(of 3 .* and 2 here\\)"),
        (
            {"c.weight": Shape((1,))},
            "differs is `c.weight` of shape \\[1\\] \\(of 3 target tensors there and 4 here\\)",
        ),
    ],
    ids=["shape", "fewer", "more"],
)
def test_the_first_tensor_that_differs_is_named(changes, message):
    shapes = {name: shape for name, shape in {**SHAPES, **changes}.items() if shape is not None}
    with pytest.raises(ValueError, match=message):
        check_fingerprint(fingerprint(SHAPES), shapes)


def test_a_row_of_padding_counts():
    padded = {**SHAPES, "b.weight": Shape((4, 2), padding=1)}
    assert fingerprint(padded)[:16] == fingerprint(SHAPES)[:16]
    for base in ({**SHAPES, "b.weight": Shape((4, 2), padding=0)}, SHAPES):
        with pytest.raises(ValueError, match=r"differs is `b.weight` of shape \[4, 2\]( with padding 0)? \("):
            check_fingerprint(fingerprint(padded), base)


def test_the_mark_of_older_files_stays():
    """A field that was added later counts only where it differs from its default."""
    config = SubspaceConfig(d=3, coordinates="low_rank", rank=2)
    assert torch.equal(mark(config), mark(SubspaceConfig(d=3, coordinates="low_rank", rank=2, factors=2, gamma=None)))
    for changes in ({"seed": 1}, {"factors": 3}, {"replace_weight": True}, {"normalization": "columns"}):
        other = SubspaceConfig(**{"d": 3, "coordinates": "low_rank", "rank": 2, **changes})
        assert not torch.equal(mark(config), mark(other))


def test_the_mark_as_integer_and_as_bytes():
    """Version 0.1 wrote one integer, later versions write its bytes."""
    assert mark(CONFIG).tolist() == [62, 4, 199, 240, 145, 217, 199, 190]
    check_mark(mark(CONFIG), CONFIG)
    check_mark(torch.tensor([int.from_bytes(bytes(mark(CONFIG).int().tolist()), "little", signed=True)]), CONFIG)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        check_mark(mark(CONFIG).to(dtype), CONFIG)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_an_average_of_equal_marks_is_the_mark(dtype):
    sizes = torch.tensor([0.3, 0.6, 0.1], dtype=dtype)
    check_mark((torch.stack([mark(CONFIG).to(dtype)] * 3) * sizes[:, None]).sum(0), CONFIG)


@pytest.mark.parametrize("share", [0.5, 0.001])
def test_an_average_of_different_marks_is_refused(share):
    """Also where the other adapter has a small share of it."""
    other = SubspaceConfig(projection="fastfood", d=3, seed=1)
    with pytest.raises(ValueError, match="must share one P to be averaged.*seed = 0.*; start each of them from this"):
        check_mark((1 - share) * mark(CONFIG) + share * mark(other), CONFIG)
    with pytest.raises(ValueError, match="must belong to the adapter it is loaded into"):
        check_mark(mark(other), CONFIG)


@pytest.mark.parametrize("damaged", [torch.zeros(0), torch.zeros(3, dtype=torch.int64), torch.full((8,), torch.nan)])
def test_a_damaged_mark_is_refused(damaged):
    with pytest.raises(ValueError, match="must belong to the adapter it is loaded into"):
        check_mark(damaged, CONFIG)
