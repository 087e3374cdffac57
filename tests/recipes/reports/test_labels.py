"""How groups of runs are named: by what differs among runs of one kind on one task, in words."""

import pytest

from recipes.lab.settings import PlainSettings
from recipes.reports.labels import apart, distinguishing, flat, labels, name, say
from tests.recipes.files import runs


def test_as_few_settings_as_tell_records_apart():
    """Of two that go together the one that says more; a second one only where the first leaves some alike."""
    both = [{"epochs": 1, "lr": 0.1}, {"epochs": 2, "lr": 0.2}]
    assert distinguishing(both) == ["lr"]
    assert distinguishing([*both, {"epochs": 3, "lr": 0.2}]) == ["lr", "epochs"]
    assert apart([*both, {"epochs": 3, "lr": 0.2}]) == [
        "rate 0.1, 1 epochs",
        "rate 0.2, 2 epochs",
        "rate 0.2, 3 epochs",
    ]
    assert distinguishing([{"own": 1}, {}]) == ["own"]
    assert distinguishing(both[:1] * 3) == []


@pytest.mark.parametrize("besides", [("d", "seed"), ("d", "seed", "epochs")])
def test_labels_are_different_exactly_where_settings_are(besides):
    """But for those that tell nothing apart, and on another task."""
    grid = {"model": ["fc", "lenet"], "seed": [0, 1], "d": [2, 3], "epochs": [1, 2]}
    made = runs(grid | {"projection": ["fastjl", "dense"], "lr": [0.1, 0.2]})
    names = labels(made, lambda run: run.projection, besides)
    for one in made:
        for other in made:
            same = flat(one.record(), [*besides, "model"]) == flat(other.record(), [*besides, "model"])
            assert (names[one.name] == names[other.name]) == same


def test_the_trajectory_is_told_apart_too():
    basis = {"projection": "basis", "d": 2, "samples": 3, "optimizer": "pbfgs"}
    made = runs({"runs": [basis | {"trajectory": {"optimizer": "sgd", "lr": lr}} for lr in (0.1, 0.2)]})
    assert set(labels(made, lambda run: "own").values()) == {
        "own, rate 0.1 of the trajectory",
        "own, rate 0.2 of the trajectory",
    }


def test_the_task_may_be_a_difference():
    made = runs({"model": ["conv2", "conv2_average"], "projection": "full"})
    assert list(labels(made, lambda run: "Adam", task=()).values()) == [
        "Adam, Conv-2",
        "Adam, Conv-2, average pooling",
    ]
    assert list(labels(made, lambda run: "Adam").values()) == ["Adam", "Adam"]


def test_runs_of_any_kind_have_labels():
    made = [PlainSettings(network="whole", gamma=gamma) for gamma in (0.1, 0.2)]
    assert list(labels(made, lambda run: run["network"]).values()) == ["whole, gamma 0.1", "whole, gamma 0.2"]


def test_words():
    assert say("batch_size", 100) == "batches of 100"
    assert say("lr", 1e-3) == "rate 0.001"
    assert say("projection", "fastjl") == "FastJL"
    assert say("own_setting", 3) == "own setting 3"
    assert name("timm/vgg11_bn") == "timm/vgg11_bn"
