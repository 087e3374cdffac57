import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from recipes.lab.results import Results
from recipes.reports import phases
from subspace_peft.measure import success_probability, threshold_dimension
from tests.recipes.files import runs as grid


RECIPE = {
    "model": "fc",
    "measured": 50,
    "runs": [
        {"projection": "full", "seed": [0, 1]},
        {"projection": "fastjl", "d": [1, 4, 16], "burn_in": [0, 8], "seed": [0, 1, 2]},
    ],
}


def finish(results, run, accuracy, training=None, origin=0.1):
    """The result of a run of two epochs, of which the first is the better one in training."""
    last = {"test_accuracy": accuracy, "train_loss": 0.1}
    better = {"test_accuracy": accuracy, "train_loss": 0.1}
    at_origin = {}
    if run.measured:
        training = accuracy if training is None else training
        last |= {"train_accuracy": training / 2, "loss": None}
        better |= {"train_accuracy": training, "loss": 0.1}
        at_origin = {"origin": {"test_accuracy": origin, "train_accuracy": origin, "loss": 2.3}}
    accuracies = {"final_accuracy": accuracy, "best_accuracy": accuracy}
    results.take(run)
    results.write(run, {"D": 100, **accuracies, **at_origin, "epochs": [better, last], "seconds": {"train": 1.0}})
    results.release(run)


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path / "results")


def rows(printed, *first):
    """The cells that follow in the row of a Markdown table that begins so."""
    (line,) = [line for line in printed.splitlines() if line.startswith("| " + " | ".join(first) + " |")]
    return [cell.strip() for cell in line.strip("|").split("|")][len(first) :]


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_the_figure_agrees_with_the_measures(seeds):
    """Some runs gave no number, some are still missing, and P_s is not monotone in d."""
    random = np.random.default_rng(seeds)
    table = pd.DataFrame(
        [
            {"d": d, "seed": seed, "final_accuracy": random.choice([round(random.random(), 3), np.nan], p=[0.9, 0.1])}
            for d in (1, 2, 8, 64)
            for seed in range(seeds - random.integers(0, 2))
        ]
    )
    P, delta = phases.success(table, "final_accuracy"), 1 / seeds
    highest = phases.boundary(table, "final_accuracy", delta)
    for level in (0.001, 0.2, 0.5, 0.8, 1.0):
        assert P[level].tolist() == success_probability(table, level).probability.tolist()
        star = threshold_dimension(table, level, delta).d
        reached = highest[highest >= level]
        assert star == (reached.index.min() if len(reached) else None)


def test_all_runs_but_one_must_reach_the_threshold(results):
    accuracies = {0: {1: 0.3, 4: 0.55, 16: 0.75}, 8: {1: 0.55, 4: 0.65, 16: 0.75}}
    runs = grid(RECIPE)
    for run in runs:
        accuracy = 0.875 if run.projection == "full" else accuracies[run.burn_in][run.d]
        finish(results, run, accuracy if run.seed < 2 else 0.05, training=accuracy)
    training, test = (phases.parts(runs, results)[name] for name in ("training", "test"))
    for said in (training, test):
        assert "3 runs of each d and t, all but one must succeed (δ = 0.33)" in said
        assert "full training: 87.50 ± 0.00 % (2 runs)" in said
        assert "accuracy, % | d*, t = 0 | d*, t = 8 |" in said
    assert "Training accuracy: of 50 images, at the best epoch" in training
    assert "Test accuracy: after the last epoch" in test
    assert rows(training, "50") == ["4", "1"]  # all three
    assert rows(training, "85") == ["none, 75.00 % at best"] * 2  # full training alone reaches it
    at_t_0, at_t_8 = rows(test, "50")  # two of three
    assert at_t_0.startswith("4 (4 to ")
    assert at_t_8.startswith("1 (1 to ")


def test_the_origin_is_that_of_each_seed_once(results):
    runs = grid(RECIPE)
    for run in runs[:-2]:  # half done
        finish(results, run, 0.5, origin=0.1 * run.seed + 0.01 * run.burn_in)
    (diagram,) = phases.diagrams(runs, results)
    found = {(row.burn_in, row.seed): row.test_accuracy for row in diagram.origins.itertuples()}
    assert found == {(t, s): pytest.approx(0.1 * s + 0.01 * t) for t in (0, 8) for s in range(3)}


def test_half_done_and_not_measured_in_training(results, tmp_path):
    """Another projection, one without full training, and t's that differ: each has its own rows."""
    one = {"projection": "fastjl", "d": [2, 8], "burn_in": [0, 4], "seed": [0, 1]}
    runs = grid(
        {
            "model": "fc",
            "runs": [
                {"projection": "full"},
                one,
                {**one, "projection": "dense", "burn_in": 16},
                {**one, "model": "lenet", "measured": 10},
            ],
        }
    )
    for i, run in enumerate(runs):
        if run.projection == "full" or i % 3:
            finish(results, run, 0.5, training=float(run.d == 8))
    said = phases.text(runs, results)
    titles = [line.split("**")[1] for line in said.splitlines() if line.startswith("**")]
    assert titles == ["LeNet on digits", "FC on digits, FastJL", "FC on digits, dense", "LeNet on digits"]
    assert "to 2 runs of each" in said
    assert "full training: no result" in said
    training = phases.parts(runs, results)["training"]
    assert len(training.splitlines()) == 2 + 2 + 5  # 70 to 99 % in the one case that was measured
    file = phases.plot(runs, results, tmp_path / "plots" / "tiny.png")
    assert imread(file).shape[0] > 3 * 3.5 * 150  # a row of panels for each


def test_without_a_run_in_a_subspace(results, tmp_path):
    runs = grid(RECIPE)
    finish(results, next(run for run in runs if run.projection == "full"), 0.9)
    assert phases.text(runs, results) == ""
    assert phases.plot(runs, results, tmp_path / "tiny.png").exists()


def test_the_figure_shows_what_all_runs_but_one_reach_and_the_origin(results, tmp_path, panels):
    runs = grid(RECIPE)
    for run in runs:
        accuracy = 0.9 if run.projection == "full" else {1: 0.2, 4: 0.5, 16: 0.8}[run.d] + 0.01 * run.seed
        finish(results, run, accuracy, origin=0.1 + 0.01 * run.seed + 0.3 * (run.burn_in > 0))
    phases.plot(runs, results, tmp_path / "tiny.png")
    ((start, burnt, curves),) = panels()
    assert start.get_title(loc="left") == "From a random start"
    assert burnt.get_title(loc="left") == "From step 8 of full training"
    assert curves.get_title(loc="left") == "Reached by all 3 runs but one"
    line, origin, *_ = curves.lines
    assert line.get_xydata().ravel() == pytest.approx([1, 21, 4, 51, 16, 81])
    assert origin.get_xydata().ravel() == pytest.approx([1 / phases.ORIGIN, 11])
