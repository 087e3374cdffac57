"""Methods: what tells them apart, what they cost, how many of their runs died, and which figure they get."""

import json

import pytest

from recipes.lab.results import Results
from recipes.reports import optimisers
from recipes.reports.labels import labels
from tests.recipes.files import runs as grid


SGD = {"optimizer": "sgd", "lr": [0.1, 0.2], "epochs": 4}
BASIS = {"projection": "basis", "d": 2, "samples": 3, "optimizer": "pbfgs", "epochs": 2, "trajectory": SGD}


@pytest.fixture
def results(tmp_path):
    (tmp_path / "results").mkdir()
    return Results(tmp_path)


def write(results, settings, accuracies):
    epochs = [{"train_loss": 1.0, "test_accuracy": a, "seconds": 10.0 * k} for k, a in enumerate(accuracies, 1)]
    results.path(settings).write_text(json.dumps({"settings": settings.record(), "epochs": epochs}))


def named(runs):
    return set(labels(runs, optimisers.method, ("seed",), ()).values())


def test_methods_are_told_apart_by_what_differs():
    """By the trajectory too, where there are several of one optimiser, and by the network; never by the seed."""
    runs = grid({"model": "fc", "seed": [0, 1], "runs": [SGD, BASIS]})
    assert named(runs) == {
        "SGD, rate 0.1",
        "SGD, rate 0.2",
        "P-BFGS, rate 0.1 of the trajectory",
        "P-BFGS, rate 0.2 of the trajectory",
    }
    two = [{"optimizer": "sgd", "epochs": 4}, {**BASIS, "trajectory": {"optimizer": "sgd", "epochs": 4}}]
    assert named(grid({"model": "fc", "seed": [0, 1], "runs": two})) == {"SGD", "P-BFGS"}
    assert named(grid({"model": ["fc", "lenet"], "optimizer": "adam"})) == {"Adam, FC", "Adam, LeNet"}


def test_a_run_in_a_basis_has_cost_the_sampled_epochs(results):
    sgd = {**SGD, "lr": 0.1}
    runs = grid({"model": "fc", "seed": [0, 1], "runs": [sgd, {**BASIS, "trajectory": sgd}]})
    for settings in runs:
        write(results, settings, [0.5, 0.7, 0.8 + 0.02 * settings.seed, 0.9][: settings.epochs])
    measured = optimisers.by_run(optimisers.courses(runs, results))
    full, basis = (measured[measured.method == method] for method in ("SGD", "P-BFGS"))
    assert len(full) == len(basis) == 2
    assert set(basis.epochs) == {2}
    assert basis.final.mean() == pytest.approx(70)
    assert sorted(basis.sampled) == pytest.approx([80, 82])  # after 3 of the 4 epochs
    assert (set(basis.sampling), set(basis.seconds)) == ({30}, {20})
    printed = optimisers.text(runs, results)
    assert "| P-BFGS | 2 | 2 | 81.00 | 70.00 ± 0.00 | 70.00 ± 0.00 | 20 | 50 |" in printed
    assert "| SGD | 2 | 4 |  | 90.00 ± 0.00 | 90.00 ± 0.00 | 40 |  |" in printed
    assert "learned" not in printed  # all did


def test_runs_that_died_are_counted_and_the_median_is_beside_the_mean(results):
    runs = grid({"model": "fc", "seed": [0, 1, 2], "optimizer": "sgd", "lr": 0.1, "epochs": 1})
    for settings, accuracy in zip(runs, (0.1, 0.8, 0.9), strict=True):  # chance is 0.1
        write(results, settings, [accuracy])
    printed = optimisers.text(runs, results)
    assert "| SGD | 3 | 2 | 1 | 60.00 ± 43.59 | 80.00 | 60.00 ± 43.59 | 10 |" in printed
    assert "| method | seeds | seeds that learned |" in printed


def test_a_search_for_rates_is_a_table_by_rate(results, tmp_path, panels):
    runs = grid({"model": "fc", "optimizer": ["sgd", "adam"], "lr": [0.1, 0.2, 0.3], "batch_size": [20, 10]})
    for settings in runs:
        write(results, settings, [0.5, settings.lr + settings.batch_size / 100])
    assert list(optimisers.parts(runs, results)) == ["rates"]
    assert "| SGD | 20 | 30.0 | 40.0 | **50.0** |" in optimisers.text(runs, results)
    optimisers.plot(runs, results, tmp_path / "tiny.png")
    (axes,) = panels()
    assert [axis.get_title(loc="left") for axis in axes] == ["batches of 20", "batches of 10"]
    assert axes[0].lines[0].get_ydata() == pytest.approx([30, 40, 50])


def test_several_batch_sizes_have_a_panel_each_with_every_seed_and_the_median_of_those_that_learned(
    results, tmp_path, panels
):
    runs = grid({"model": "fc", "optimizer": "sgd", "lr": 0.1, "batch_size": [20, 10], "seed": [0, 1, 2]})
    for settings in runs:
        write(results, settings, [0.3, 0.1 if settings.seed == 0 else 0.6 + 0.1 * settings.seed])
    optimisers.plot(runs, results, tmp_path / "tiny.png")
    (axes,) = panels()
    assert len(axes) == 2
    *seeds, median = axes[0].lines
    assert len(seeds) == 3
    assert median.get_ydata() == pytest.approx([30, 75])
    assert median.get_label() == "SGD: 2 of 3 learn"


def test_one_batch_size_each_is_drawn_over_epochs_and_seconds(results, tmp_path, panels):
    sgd = {**SGD, "lr": 0.1}
    runs = grid({"model": "fc", "runs": [sgd, {**BASIS, "batch_size": 1024, "trajectory": sgd}]})
    for settings in runs:
        write(results, settings, [0.5, 0.7, 0.8, 0.9][: settings.epochs])
    optimisers.plot(runs, results, tmp_path / "tiny.png")
    ((epochs, seconds),) = panels()
    assert epochs.lines[1].get_xdata().tolist() == [1, 2]
    assert seconds.lines[1].get_xdata().tolist() == [40, 50]  # after the 30 seconds of the samples
