import pandas as pd
import pytest

from recipes.reports import dimension as summary
from recipes.reports import figures as plots


@pytest.fixture
def runs():
    """Best is last plus a point; at d = 20 the mean of the last is 0.89, at 40 it is 0.91."""
    rows = [("full", 0, 0.99), ("full", 0, 0.97)]
    rows += [
        ("fastjl", d, accuracy + e) for d, accuracy in ((10, 0.7), (20, 0.89), (40, 0.91)) for e in (-0.005, 0.005)
    ]
    columns = ["projection", "d", "final_accuracy"]
    table = pd.DataFrame(rows, columns=columns).assign(dataset="mnist", model="lenet", D=44426, seconds=1.0)
    return table.assign(best_accuracy=table.final_accuracy + 0.01, seed=table.groupby(["projection", "d"]).cumcount())


def test_d_int90_is_by_full_training_by_the_accuracy_itself_and_by_the_best_epoch(runs):
    (found,) = summary.dimensions(runs)
    assert found.relative.threshold == pytest.approx(0.9 * 0.98)
    assert (found.relative.d, found.absolute.d, found.best.d) == (20, 40, 20)


@pytest.mark.parametrize(("absolute", "d"), [(0.6, 10), ({"lenet": 0.6}, 10), ({"fc": 0.6}, 40)])
def test_the_accuracy_to_reach_may_be_given_by_model(runs, absolute, d):
    assert summary.dimensions(runs, absolute)[0].absolute.d == d


def test_what_no_d_reaches_is_said_with_the_best_that_was_seen(runs):
    assert "| 95 | none, 91.50 % at best" in summary.text(runs, 0.95)


def test_without_full_training_there_is_no_share_of_it(runs):
    text = summary.text(runs[runs.projection != "full"])
    assert "| mnist | lenet | fastjl |  |  | 90 | 40" in text


def test_runs_that_differ_in_more_than_d_and_seed_are_never_averaged(runs):
    slow = runs[runs.projection != "full"].assign(lr=0.1, final_accuracy=0.5)
    found = summary.dimensions(pd.concat([runs.assign(lr=0.3), slow]))
    assert [(f.projection, f.absolute.d) for f in found] == [("fastjl, lr 0.1", None), ("fastjl, lr 0.3", 40)]


def test_full_trainings_that_differ_are_an_error(runs):
    with pytest.raises(ValueError, match="must differ in seed alone, got several `lr`"):
        summary.dimensions(runs.assign(lr=[0.1, 0.2] + [0.3] * 6))


def test_a_run_without_a_number_is_a_failure_and_is_shown(runs):
    runs.loc[runs.d == 40, "final_accuracy"] = float("nan")
    assert "none, 89.50 % at best, 2 runs without a number" in summary.text(runs)


def test_the_figure_is_drawn(runs, tmp_path):
    file = plots.plot(runs, {"lenet": {"Gargiulo 2023": 30}}, tmp_path / "figure.png", {"lenet": 0.9})
    assert file.stat().st_size > 10_000
