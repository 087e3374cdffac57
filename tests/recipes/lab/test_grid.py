"""What the command line leaves of a grid."""

import pytest

from recipes import run
from recipes.lab.grid import grid, read
from recipes.lab.kinds import Kind, measured, plain
from recipes.lab.results import Results
from tests.recipes.files import RECIPES, runs


MNIST = RECIPES / "intrinsic_dimension" / "mnist.yaml"
GRID = {
    "model": "fc",
    "seed": [0, 1],
    "runs": [
        {"projection": "full", "lr": 0.001},
        {"projection": ["dense", "fastjl"], "d": [10, 20], "lr": 0.1, "epochs": 3},
        {"model": "lenet", "projection": "full", "lr": 0.001, "epochs": 5},
        {"model": "lenet", "projection": "fastjl", "d": [20, 30], "lr": 0.05, "epochs": 5},
    ],
}


def labels(given: dict) -> list[str]:
    return sorted(f"{run} lr={run.lr:g} epochs={run.epochs}" for run in runs(GRID, given))


def test_a_value_of_the_file_selects():
    assert labels({"model": ["lenet"], "d": ["20"], "seed": ["1"]}) == [
        "lenet fastjl d=20 seed=1 lr=0.05 epochs=5",
        "lenet full seed=1 lr=0.001 epochs=5",
    ]


def test_a_sub_grid_with_other_values_alone_is_dropped_and_no_other_takes_its_place():
    """The group of FC must not become a second group of LeNet, with the epochs of FC."""
    recipe = read(MNIST, {"model": ["lenet"], "projection": ["fastjl"], "d": ["200"], "seed": ["7"]})
    assert [(run.model, run.projection, run.d, run.seed) for run in recipe.runs] == [
        ("lenet", "full", 0, 7),
        ("lenet", "fastjl", 200, 7),
    ]
    assert len({run.epochs for run in recipe.runs}) == 1


def test_another_value_takes_the_place_of_the_files():
    assert labels({"model": ["fc"], "projection": ["dense"], "d": ["15"], "seed": ["7"]}) == [
        "fc dense d=15 seed=7 lr=0.1 epochs=3",
        "fc full seed=7 lr=0.001 epochs=10",
    ]
    assert labels({"model": ["fc"], "projection": ["dense"], "d": ["15", "10"], "seed": ["0"]})[:2] == [
        "fc dense d=10 seed=0 lr=0.1 epochs=3",
        "fc dense d=15 seed=0 lr=0.1 epochs=3",
    ]


def test_a_number_that_stands_alone_selects_too():
    assert {run.model for run in runs(GRID, {"epochs": ["5"]})} == {"lenet"}
    assert {run.epochs for run in runs(GRID, {"epochs": ["7"]})} == {7}
    assert len(runs(GRID, {"epochs": ["7"]})) == len(runs(GRID))


def test_a_sub_grid_that_does_not_name_a_setting_has_its_default():
    recipe = {"model": "fc", "runs": [{"optimizer": "sgd", "momentum": 0.9}, {"optimizer": "adam"}]}
    assert [run.optimizer for run in runs(recipe, {"momentum": ["0.9"]})] == ["sgd"]
    assert [run.optimizer for run in runs(recipe, {"momentum": ["0"], "optimizer": ["sgd"]})] == ["sgd"]


def test_the_baseline_is_not_narrowed_by_settings_of_subspaces():
    recipe = read(RECIPES / "vit_lora" / "mnist.yaml", {"coordinates": ["low_rank"], "seed": ["0"]})
    assert {run.label for run in recipe.runs if run.method in ("full", "head")} == {"full fine-tuning", "head alone"}
    assert {run.coordinates for run in recipe.runs if run.method == "subspace"} == {"low_rank"}
    recipe = read(RECIPES / "lottery" / "mnist.yaml", {"pruned": ["true"]})
    assert {(run.projection, run.pruned) for run in recipe.runs} == {("full", False), ("coordinate", True)}


def test_numbers_are_told_apart_by_their_value_not_by_how_they_are_written():
    recipe = {"lr": [0.001, 0.01], "runs": [{"projection": "full"}]}
    assert [run.lr for run in runs(recipe, {"lr": ["1e-3"]})] == [0.001]


def test_nothing_left_is_an_error():
    with pytest.raises(
        ValueError, match="must leave a run with each of its values, none has model lenet of model lenet, d 10; give"
    ):
        runs({**GRID, "runs": GRID["runs"][1::2]}, {"model": ["lenet"], "d": ["10"]})


def test_a_value_that_is_asked_for_never_vanishes():
    """The rate of the baseline must not select the baseline alone where another projection was asked for."""
    with pytest.raises(ValueError, match="none has projection fastjl of projection fastjl, lr 0.001; give other"):
        runs(GRID, {"projection": ["fastjl"], "lr": ["0.001"]})


def test_what_the_report_cannot_show_is_said_before_anything_is_trained(tmp_path):
    with pytest.raises(ValueError, match="Full trainings of one network must differ in seed alone, got several `lr`"):
        run.main([str(MNIST), "--lr", "0.1", "0.2", "--output", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_a_kind_of_run_without_declared_settings_knows_those_of_its_file(tmp_path):
    kind: Kind = measured("none", lambda run: {}, options=("data",))
    recipe = {"eps": [1, 0.1], "runs": [{"network": "whole"}, {"network": "narrow", "width": [10, 20]}]}
    assert [run.record() for run in grid(kind, recipe, {"network": ["narrow"], "width": ["20"], "data": ["a"]})] == [
        {"eps": 1, "network": "narrow", "width": 20},
        {"eps": 0.1, "network": "narrow", "width": 20},
    ]
    one, other = grid(kind, recipe, {"width": ["10"], "network": ["narrow"], "data": ["a"]})
    assert one["_data"] == "a"
    assert one.name == grid(kind, recipe)[2].name != other.name
    assert not Results(tmp_path).has(one)


def test_a_setting_that_a_run_needs_and_lacks_is_named():
    (run,) = grid(measured("none", lambda run: {}), {"eps": 1})
    with pytest.raises(ValueError, match="A run of this kind needs the setting `seed`, and has none: eps 1; add it"):
        run["seed"]


def test_text_is_no_number():
    kind = measured("none", lambda run: {})
    with pytest.raises(ValueError, match="`eps` must be a number, got 'small'"):
        grid(kind, {"eps": [1, 0.1]}, {"eps": ["small"]})


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 0.001), ("7", 7), ("true", True), ("false", False), ("False", False), ("mlp", "mlp"), (None, None)]
    + [([1, 2], [1, 2])],
)
def test_text_becomes_a_number_or_a_truth_value_where_it_is_one(text, value):
    assert plain(text) == value
    assert type(plain(text)) is type(value)
