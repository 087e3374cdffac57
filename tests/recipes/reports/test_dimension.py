"""d_int90 and the accuracies by d: by which threshold, of which runs, and what is said where none is reached."""

import pytest

from recipes.lab.results import Results
from recipes.reports import dimension
from tests.recipes.files import runs


D = {10: 0.7, 20: 0.89, 40: 0.91}
"""Mean accuracy after the last epoch by d; the best epoch is a point better, each seed half a point to a side."""
FULL, SUBSPACE = {"projection": "full"}, {"projection": "fastjl", "d": list(D)}
RECIPE = {"dataset": "mnist", "model": "lenet", "seed": [0, 1]}


def finish(results, run, accuracy):
    results.take(run)
    epoch = {"train_loss": None if accuracy is None else 0.1}
    accuracies = {"final_accuracy": accuracy or 0.0, "best_accuracy": min((accuracy or 0.0) + 0.01, 1)}
    results.write(run, {"D": 44426, **accuracies, "epochs": [epoch], "seconds": {"train": 1.0}})
    results.release(run)


def accuracy(run):
    return 0.98 + 0.02 * (0.5 - run.seed) if run.projection == "full" else D[run.d] + 0.01 * (run.seed - 0.5)


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path)


def finished(results, *parts, accuracy=accuracy):
    """The runs of sub-grids, each with a result."""
    made = runs(RECIPE | {"runs": list(parts)})
    for run in made:
        finish(results, run, accuracy(run))
    return made


@pytest.fixture
def made(results):
    return finished(results, FULL, SUBSPACE)


def dimensions(made, results, absolute=0.9):
    (task,) = dimension.tasks(made, results)
    return dimension.dimensions(task, absolute)


def row(printed, *first):
    (line,) = [line for line in printed.splitlines() if line.startswith("| " + " | ".join(first) + " |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_where_full_training_diverged_the_accuracy_itself_counts(results):
    made = finished(results, FULL, SUBSPACE, accuracy=lambda run: None if run.projection == "full" else accuracy(run))
    ((_, least),) = dimensions(made, results).items()
    assert least.relative is None
    assert least.absolute.d == 40
    assert "FastJL" in dimension.text(made, results)


def test_d_int90_is_by_full_training_by_the_accuracy_itself_and_by_the_best_epoch(made, results):
    ((label, least),) = dimensions(made, results).items()
    assert label == "FastJL"
    assert least.relative.threshold == pytest.approx(0.9 * 0.98)
    assert (least.relative.d, least.absolute.d, least.best.d) == (20, 40, 20)


@pytest.mark.parametrize(("absolute", "d"), [(0.6, 10), ({"lenet": 0.6}, 10), ({"fc": 0.6}, 40)])
def test_the_accuracy_to_reach_may_be_given_by_model(made, results, absolute, d):
    assert dimensions(made, results, absolute)["FastJL"].absolute.d == d


def test_the_tables_have_d_int90_with_the_published_one_and_the_accuracies_by_d(made, results):
    tables = dimension.parts(made, results, published={"lenet": {"Li": 290, "Gargiulo": 170}})
    assert list(tables) == ["d_int90", "accuracy"]
    cells = row(tables["d_int90"], "LeNet on MNIST, D = 44,426", "FastJL")
    assert cells[2:5] == ["20", "88.20", "90"]
    assert cells[-1] == "Li: 290; Gargiulo: 170"
    accuracies = row(tables["accuracy"], "FastJL")
    assert accuracies == ["FastJL", "2", "70.00 ± 0.71", "89.00 ± 0.71", "91.00 ± 0.71", "", "1"]
    assert row(tables["accuracy"], "full training") == ["full training", "2", "", "", "", "98.00 ± 1.41", "1"]
    assert dimension.text(made, results) == "\n\n".join(dimension.parts(made, results).values())


def test_what_no_d_reaches_is_said_with_the_best_that_was_seen(made, results):
    assert "| 95 | none, 91.50 % at best" in dimension.text(made, results, 0.95)


def test_without_full_training_there_is_no_share_of_it(results):
    made = finished(results, SUBSPACE)
    assert "| LeNet on MNIST, D = 44,426 | FastJL | 90 | 40 |" in dimension.text(made, results)
    assert "full" not in dimension.text(made, results)


def test_runs_that_differ_in_more_than_d_and_seed_are_never_averaged(results):
    fast = finished(results, SUBSPACE | {"lr": 0.3})
    slow = finished(results, SUBSPACE | {"lr": 0.1}, accuracy=lambda run: 0.5)
    least = dimensions(fast + slow, results)
    assert {label: each.absolute.d for label, each in least.items()} == {
        "FastJL, rate 0.1": None,
        "FastJL, rate 0.3": 40,
    }


def test_full_trainings_that_differ_are_an_error_before_and_after_the_runs(results):
    made = runs(RECIPE | {"runs": [FULL | {"lr": [0.1, 0.2]}, SUBSPACE]})
    with pytest.raises(ValueError, match="must differ in seed alone, got several `lr`; leave one"):
        dimension.check(made)
    with pytest.raises(ValueError, match="must differ in seed alone, got several `lr`; leave one"):
        dimension.text(made, results)
    dimension.check(runs(RECIPE | {"runs": [FULL | {"model": ["lenet", "fc"]}, SUBSPACE]}))


def test_a_run_without_a_number_is_a_failure_and_is_shown(results):
    made = finished(results, FULL, SUBSPACE, accuracy=lambda run: None if run.d == 40 else accuracy(run))
    assert "none, 89.50 % at best, 2 runs without a number" in dimension.text(made, results)


def test_the_figure_has_a_panel_each_network(results, tmp_path, panels):
    made = finished(results, FULL, SUBSPACE) + finished(results, FULL | {"model": "fc"}, SUBSPACE | {"model": "fc"})
    file = dimension.plot(
        made, results, tmp_path / "plots" / "tiny.png", {"lenet": 0.9}, {"lenet": {"Gargiulo 2023": 30}}
    )
    assert file.stat().st_size > 10_000
    ((lenet, fc),) = panels()
    assert [panel.get_title(loc="left") for panel in (lenet, fc)] == [
        "LeNet, 44\N{THIN SPACE}426 parameters",
        "FC, 44\N{THIN SPACE}426 parameters",
    ]
    (line,) = [line for line in lenet.lines if line.get_label() == "FastJL"]
    assert line.get_xydata().ravel() == pytest.approx([10, 70, 20, 89, 40, 91])
    assert [text.get_text() for text in lenet.get_legend().get_texts()] == ["Gargiulo 2023: 30"]
