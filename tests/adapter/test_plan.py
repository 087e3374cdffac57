"""The plan: what P it makes, and what it refuses."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from subspace_peft import SubspaceConfig
from tests.cases import BY_NAME, REPLACED, dense_P, refused, settings, wrap
from tests.models import MLP


CASE = BY_NAME["convnet"]


@pytest.mark.parametrize("projection", ["dense", "fastfood", "fastjl", "kronecker"])
def test_every_coordinate_of_theta_d_moves_every_tensor(projection):
    model = wrap(CASE, projection=projection, d=50)
    assert all((P != 0).any(0).all() for P in dense_P(model).values())


def test_adding_targets_only_scales_the_columns_of_other_rows():
    few, many = (
        dense_P(wrap(CASE, projection="fastfood", normalization="columns", target_modules=targets, d=9))
        for targets in (["conv1"], ["conv1", "head", "bn1"])
    )
    for name, P in few.items():
        ratio = many[name] / P  # one scale for each column: the norm over more rows
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-5, atol=0)


def test_adding_targets_only_scales_other_rows():
    few = dense_P(wrap(BY_NAME["mlp"], target_modules=["fc2"]))
    many = dense_P(wrap(BY_NAME["mlp"]))
    for name, P in few.items():
        ratio = (P / many[name])[many[name].abs() > 1e-3]
        torch.testing.assert_close(ratio, ratio[0].expand_as(ratio), rtol=1e-4, atol=1e-4)


def test_one_config_wraps_several_models():
    config = settings(projection="identity", d=None)
    written = config.to_dict()
    for model, D in ((MLP(), 114), (nn.Sequential(nn.Linear(6, 4)), 28)):
        assert get_peft_model(model, config).peft_config["default"].D == D
        assert {**config.to_dict(), "auto_mapping": None} == {**written, "auto_mapping": None}


def test_a_config_that_another_model_filled_in():
    config = get_peft_model(MLP(), settings(projection="identity", d=None)).peft_config["default"]
    smaller = nn.Sequential(nn.Linear(6, 4))
    with refused(
        smaller,
        "at most the D = 28 .* got 114; .* a config of its own: wrapping filled in this one for a model of D = 114",
    ):
        config.target_modules = "all"
        get_peft_model(smaller, config)


@pytest.mark.parametrize(
    ("name", "targets", "changes", "message"),
    [
        ("mlp", "all", {"rank": 5}, "`rank` must be at most the smaller dimension, 4 for `fc2.weight`"),
        ("convnet", ["conv2"], {}, "must be given modules that .*, but `conv2.weight` is of Conv2d of 2 groups"),
        ("recurrent", "all", {"parameters": None}, "must be given modules that run as two smaller ones"),
        ("attention", "all", {"parameters": None}, "must be given modules that run as two smaller ones"),
        ("norms", "all", {}, "need target tensors of two or more dimensions"),
    ],
)
def test_modules_that_do_not_fit(name, targets, changes, message):
    model = BY_NAME[name].model()
    with refused(model, message):
        get_peft_model(model, SubspaceConfig(**{**REPLACED, "target_modules": targets, **changes}))
