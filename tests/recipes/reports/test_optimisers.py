import json

import pytest

from recipes.lab.grid import grid
from recipes.lab.results import Results
from recipes.reports import optimisers as methods


SGD = {"optimizer": "sgd", "lr": [0.1, 0.2], "epochs": 4}
BASIS = {"projection": "basis", "d": 2, "samples": 3, "optimizer": "pbfgs", "epochs": 2, "trajectory": SGD}


def write(results, settings, accuracies):
    epochs = [{"train_loss": 1.0, "test_accuracy": a, "seconds": 10.0 * k} for k, a in enumerate(accuracies, 1)]
    results.path(settings).write_text(json.dumps({"epochs": epochs}))


def test_methods_are_told_apart_by_what_differs():
    """By the trajectory too, where there are several of one optimiser; never by the seed."""
    runs = grid({"model": "fc", "seed": [0, 1], "runs": [SGD, BASIS]})
    assert set(methods.labels(runs).values()) == {
        "SGD, lr 0.1",
        "SGD, lr 0.2",
        "P-BFGS, trajectory SGD, lr 0.1",
        "P-BFGS, trajectory SGD, lr 0.2",
    }
    two = [{"optimizer": "sgd", "epochs": 4}, {**BASIS, "trajectory": {"optimizer": "sgd", "epochs": 4}}]
    assert set(methods.labels(grid({"model": "fc", "seed": [0, 1], "runs": two})).values()) == {"SGD", "P-BFGS"}


def test_a_run_in_a_basis_has_cost_the_sampled_epochs(tmp_path):
    sgd = {**SGD, "lr": 0.1}
    runs, results = (
        grid({"model": "fc", "seed": [0, 1], "runs": [sgd, {**BASIS, "trajectory": sgd}]}),
        Results(tmp_path),
    )
    for settings in runs:
        write(results, settings, [0.5, 0.7, 0.8 + 0.02 * settings.seed, 0.9][: settings.epochs])
    full, basis = methods.by_method(methods.courses(runs, results)).to_dict("records")
    assert (full["method"], basis["method"]) == ("SGD", "P-BFGS")
    assert (full["seeds"], basis["seeds"], basis["epochs"]) == (2, 2, 2)
    assert basis["final"] == pytest.approx(70)
    assert basis["sampled"] == pytest.approx(81)  # after 3 of the 4 epochs, mean of 80 and 82
    assert (basis["sampling"], basis["seconds"]) == (30, 20)
    assert "| P-BFGS | 2 | 2 | 81.00 | 70.00 ± 0.00 | 70.00 ± 0.00 | 20 | 50 |" in methods.text(runs, results)
