"""SubspaceConfig: every wrong value is an error with the rule, the value and the way out."""

import json

import numpy as np
import pytest
import torch
from peft import PeftConfig

from subspace_peft import SubspaceConfig
from tests.cases import REPLACED


LOW_RANK = {"coordinates": "low_rank", "rank": 2}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"d": 0}, "`d` must be an integer of at least 1, got 0"),
        ({"d": -3}, "at least 1, got -3"),
        ({"d": 2.5}, "must be an integer of at least 1, got 2.5"),
        ({"d": True}, "must be an integer of at least 1, got True"),
        ({"init_weights": "gaussian"}, "`init_weights` must be one of True, False; got 'gaussian'"),
        ({"cache_projection": "no"}, "`cache_projection` must be True, False or a number of bytes, got 'no'"),
        ({"cache_projection": -1}, "`cache_projection` must be True, False or a number of bytes, got -1"),
        ({"save_projection": "yes"}, "`save_projection` must be one of True, False, None; got 'yes'"),
        ({"coordinates": "low_rank", "rank": 1, "alpha": "x"}, "`alpha` must be a number, got 'x'"),
        ({"d": None}, "`d` is needed for projection='kronecker'"),
        ({"projection": "fastfod"}, "`projection` must be one of dense, sparse.*got 'fastfod'"),
        ({"coordinates": "weights"}, "`coordinates` must be one of weight, low_rank; got 'weights'"),
        ({"normalization": "cols"}, "`normalization` must be one of rows, columns; got 'cols'"),
        (
            {"rank": 4},
            "`rank` belongs to coordinates='low_rank', got rank=4 with coordinates='weight'; .* leave `rank` out",
        ),
        ({"alpha": 4.0}, "`alpha` belongs to coordinates='low_rank', got alpha=4.0 with coordinates='weight'"),
        ({"coordinates": "low_rank"}, "`rank` is needed for coordinates='low_rank'"),
        ({**LOW_RANK, "rank": 0}, "`rank` must be an integer of at least 1, got 0"),
        ({"nnz_per_row": 2}, "belongs to projection='sparse' or projection='fastjl', got nnz_per_row=2 with"),
        ({"projection": "sparse", "nnz_per_row": 8}, "`nnz_per_row` must be at most d = 7, got 8"),
        ({"projection": "sparse", "nnz_per_row": 0}, "`nnz_per_row` must be an integer of at least 1, got 0"),
        ({"seed": -1}, "`seed` must be an integer from 0 to 2\\*\\*63 - 1, got -1"),
        ({"seed": "a"}, "`seed` must be an integer .*got 'a'"),
        ({"basis": torch.eye(7)}, "`basis` belongs to projection='basis', got projection='kronecker'"),
        ({"mask": torch.ones(7) > 0}, "`mask` belongs to projection='coordinate', got projection='kronecker'"),
        ({"basis": np.eye(7)}, "`basis` belongs to projection='basis', got projection='kronecker'"),
        ({"factors": 3}, "`factors` belongs to coordinates='low_rank', got factors=3 with coordinates='weight'"),
        ({"gamma": 0}, "`gamma` belongs to coordinates='low_rank', got gamma=0 with coordinates='weight'"),
        ({"projection": ["dense"]}, "`projection` must be one of dense, sparse.*got \\['dense'\\]"),
        ({"init_weights": 1}, "`init_weights` must be one of True, False; got 1"),
        ({"projection_version": 99}, "`projection_version` must be at most 1 .*got 99.*upgrade subspace_peft"),
        ({"projection_version": 0}, "`projection_version` must be at least 1, got 0"),
        (
            {"target_modules": "fc.*", "layers_to_transform": [0]},
            "`layers_to_transform` needs `target_modules` to be a list, got 'fc",
        ),
        (
            {"target_modules": "fc.*", "layers_pattern": "h"},
            "`layers_pattern` needs `target_modules` to be a list, got 'fc",
        ),
        (
            {"target_modules": ["fc"], "layers_pattern": "h"},
            "`layers_pattern` needs `layers_to_transform`, got `layers_pattern` = 'h' alone",
        ),
        ({"parameters": "weight"}, "`parameters` must be a list of names or 'vectors', got 'weight'"),
        ({"parameters": []}, "`parameters` must be a list of names or 'vectors', got \\[\\]; leave it out for all"),
        ({"parameters": 3}, "`parameters` must be a list of names or 'vectors', got 3"),
        ({"task_type": "NONSENSE"}, "NONSENSE"),
    ],
    ids=str,
)
def test_bad_values(bad, message):
    with pytest.raises(ValueError, match=message):
        SubspaceConfig(**{"d": 7, **bad})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            {"target_modules": [0]},
            r"must be a list of names or a regular expression, got \[0\]; write names as strings",
        ),
        ({"target_modules": 5}, "`target_modules` must be a list of names or a regular expression, got 5"),
        ({"target_modules": "("}, r"`target_modules` must be .*got '\(' \(missing \), .*; put a backslash"),
        ({"exclude_modules": 3}, "`exclude_modules` must be a list of names or a regular expression, got 3"),
        ({"modules_to_save": "lm_head"}, "`modules_to_save` must be a list of names, got 'lm_head'"),
        ({"parameters": [1]}, r"`parameters` must be a list of names or 'vectors', got \[1\]"),
    ],
    ids=str,
)
def test_what_names_nothing(bad, message):
    with pytest.raises(ValueError, match=message):
        SubspaceConfig(d=7, **bad)


def test_d_follows_where_it_can():
    for projection in ("identity", "basis", "coordinate"):
        assert SubspaceConfig(projection=projection).d is None


def test_alpha_is_the_rank_if_left_out():
    assert SubspaceConfig(d=7, **LOW_RANK).alpha == 2
    assert SubspaceConfig(d=7, alpha=6, **LOW_RANK).alpha == 6


def test_a_config_survives_its_file(tmp_path):
    config = SubspaceConfig(d=7, projection="sparse", nnz_per_row=2, seed=2**62, target_modules=["b", "a"], **LOW_RANK)
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == config
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "SUBSPACE_PEFT"


def test_a_given_basis_is_not_written_into_the_config(tmp_path):
    SubspaceConfig(projection="basis", basis=torch.eye(3)).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["basis"] is None


def test_a_config_of_the_first_version_loads(tmp_path):
    """The names and meanings of these fields are the public API of adapter_config.json."""
    first = {
        "peft_type": "SUBSPACE_PEFT", "D": 114, "coordinates": "weight", "d": 7, "normalization": "rows", "seed": 3,
        "projection": "fastjl", "projection_version": 1, "save_projection": False, "target_modules": ["fc1", "fc2"],
        "fingerprint": "00000000", "init_weights": True, "parameters": None, "rank": None, "alpha": None,
        "nnz_per_row": 2, "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None,
        "modules_to_save": None, "cache_projection": True, "subspace_peft_version": "0.1.0",
    }  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(first))
    config = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, SubspaceConfig)
    assert config.target_modules == {"fc1", "fc2"}
    assert {k: getattr(config, k) for k in first if k != "target_modules"} == {
        k: v for k, v in first.items() if k != "target_modules"
    }


def test_numpy_integers_become_int():
    config = SubspaceConfig(d=np.int64(3), seed=np.int32(5), coordinates="low_rank", rank=np.uint8(2))
    assert [type(value) for value in (config.d, config.seed, config.rank)] == [int] * 3


@pytest.mark.parametrize("alpha", [0, float("nan"), float("inf")])
def test_alpha_must_be_finite_and_not_zero(alpha):
    with pytest.raises(ValueError, match="`alpha` must be finite"):
        SubspaceConfig(d=3, coordinates="low_rank", rank=2, alpha=alpha)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "`rank` must be an integer of at least 1"),
        ({"rank": None}, "`rank` is needed"),
        ({"replace_weight": "svd"}, "`replace_weight` must be one of True, False; got 'svd'"),
        ({"start": "zeros"}, "`start` must be one of svd, orthogonal, random"),
        ({"start": "svd", "replace_weight": False}, "`start` belongs to replace_weight=True, got start='svd' with"),
        ({"factors": 4}, "`factors` must be one of 2, 3; got 4"),
        ({"gamma": 0.1}, "`gamma` belongs to factors=3, got gamma=0.1 with factors=2; set factors=3 or leave"),
        ({"factors": 2.0}, "`factors` must be one of 2, 3; got 2.0"),
        ({"gamma": -1.0, "factors": 3}, "`gamma` must be a finite number of at least 0"),
        ({"gamma": float("nan"), "factors": 3}, "`gamma` must be a finite number of at least 0"),
        ({"gamma": "x", "factors": 3}, "`gamma` must be a finite number of at least 0, got 'x'"),
        ({"gamma": True, "factors": 3}, "`gamma` must be a finite number of at least 0, got True"),
        ({"coordinates": "weight", "rank": None}, "`replace_weight` belongs to coordinates='low_rank', got .*=True"),
    ],
)
def test_a_config_that_no_model_could_make_right(changes, message):
    with pytest.raises(ValueError, match=message):
        SubspaceConfig(**{**REPLACED, "target_modules": ["fc1"], **changes})
