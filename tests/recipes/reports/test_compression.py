import json

import pytest
import torch
from torch import nn

from recipes.lab.results import Results, read_measurement
from recipes.lottery import spectra
from recipes.reports import compression
from recipes.reports.labels import labels
from subspace_peft import Trajectory
from tests.recipes.files import runs as grid


SAMPLED = {"optimizer": "sgd", "lr": 0.1, "epochs": 4}
LOTTERY = {"projection": "basis", "d": [1, 2, 4], "increments": True, "samples": 4, "trajectory": SAMPLED}
PRUNED = {"projection": "coordinate", "pruned": True, "d": [2, 4]}
RECIPE = {
    "model": "fc",
    "measured": 10,
    "seed": [0, 1],
    "runs": [
        {"projection": "full"},
        {"projection": "fastjl", "d": [2, 4], "burn_in": [0, 16]},
        {**LOTTERY, "burn_in": [0, 16]},
        {**PRUNED, "burn_in": [0, 16]},
        {**PRUNED, "burn_in": [0, 16], "trajectory": SAMPLED},
    ],
}
TABLE_1 = ["random pruning", "random pruning, t = 16", "lottery ticket", "lottery ticket, t = 16"]
TABLE_1 += ["random affine", "burn-in affine, t = 16", "lottery subspace", "lottery subspace, t = 16"]


def finish(results, run, accuracy, best=None):
    epoch = {"test_accuracy": accuracy, "train_loss": 0.1, "train_accuracy": accuracy, "loss": None}
    accuracies = {"final_accuracy": accuracy, "best_accuracy": accuracy if best is None else best}
    results.take(run)
    results.write(run, {"D": 64, **accuracies, "epochs": [epoch], "seconds": {"train": 1.0}})
    results.release(run)


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path / "results")


def cells(printed, label):
    """The rows of all tables that begin with the label."""
    lines = [line for line in printed.splitlines() if line.startswith(f"| {label} |")]
    return [[cell.strip() for cell in line.strip("|").split("|")][1:] for line in lines]


def test_methods_have_the_names_of_table_1():
    runs = grid(RECIPE)
    names = labels(runs, compression.method)
    assert set(names.values()) == {compression.FULL, *TABLE_1}
    assert all(names[run.name] == compression.method(run) for run in runs)  # nothing else tells them apart


def test_runs_of_one_name_are_told_apart_by_what_differs():
    """By the trajectory too; never by the seed, and not by what differs on another task."""
    two = {**LOTTERY, "trajectory": {**SAMPLED, "lr": 0.2}}
    affine = {"projection": ["fastjl", "dense"], "d": 2, "lr": 0.1}
    other = {"projection": "fastjl", "d": 2, "lr": 0.5, "model": "lenet"}
    runs = grid({"model": "fc", "seed": [0, 1], "runs": [LOTTERY, two, affine, other]})
    assert set(labels(runs, compression.method).values()) == {
        "lottery subspace, rate 0.1 of the trajectory",
        "lottery subspace, rate 0.2 of the trajectory",
        "random affine, FastJL",
        "random affine, dense",
        "random affine",
    }


def test_lottery_subspaces_have_the_running_maximum_of_each_seed(results):
    runs = grid({**RECIPE, "runs": [RECIPE["runs"][0], LOTTERY]})
    accuracies = {1: (0.2, 0.4), 2: (0.8, 0.3), 4: (0.6, 0.5)}  # of seeds 0 and 1
    for run in runs:
        finish(results, run, accuracies[run.d][run.seed] if run.d else 0.8)
    said = compression.text(runs, results)
    maximum, near = cells(said, "lottery subspace, running maximum")
    assert maximum == ["2", "30.00 ± 14.14", "60.00 ± 28.28", "65.00 ± 21.21"]
    assert cells(said, "lottery subspace")[0] == ["2", "30.00 ± 14.14", "55.00 ± 35.36", "55.00 ± 7.07"]
    assert near[0].startswith("none, 80.00 % at best")
    assert "best of all d' up to d of the same seed, by the test images" in said
    assert "epoch that is best" not in said  # it is the last everywhere


def test_the_smallest_d_near_full_training_and_the_best_epochs(results):
    runs = grid({**RECIPE, "runs": RECIPE["runs"][:2]})
    for run in runs:
        accuracy = 0.8 if not run.d else 0.795 if run.d == 4 else 0.3 + 0.495 * (run.burn_in > 0)
        finish(results, run, accuracy, best=0.9 if run.d == 2 else None)
    said = compression.text(runs, results)
    assert "**FC on digits**, D = 64; full training 80.00 ± 0.00 % (2 seeds)" in said
    final, best, near = cells(said, "random affine")
    assert (final, best) == (["2", "30.00 ± 0.00", "79.50 ± 0.00"], ["2", "90.00 ± 0.00", "79.50 ± 0.00"])
    assert near == ["4", "16.0"]  # 79.5 % are more than 99 % of 80 %
    assert cells(said, "burn-in affine, t = 16")[2] == ["2", "32.0"]


def test_half_done_and_without_full_training(results, tmp_path):
    runs = [run for run in grid(RECIPE) if run.projection != "full" and "ticket" not in compression.method(run)]
    for run in runs:
        if run.seed == 0 or run.d == 4:
            finish(results, run, 0.1 * run.d)
    said = compression.text(runs, results)
    assert "full training" not in said
    assert cells(said, "random affine") == [["1 to 2", "", "20.00", "40.00 ± 0.00"]]
    assert "nan" not in said
    file = compression.plot(runs, results, tmp_path / "plots" / "tiny.png")
    assert file.stat().st_size > 20_000
    assert compression.text(grid({"model": "lenet"}), results) == ""


@pytest.fixture
def lottery(tmp_path):
    """A recipe with one of two trajectories recorded: steps of 4, 3, 2 and 1 along the axes."""
    file = tmp_path / "tiny.yaml"
    file.write_text(json.dumps({**RECIPE, "runs": [RECIPE["runs"][0], LOTTERY]}))
    runs, results = grid({**RECIPE, "runs": [LOTTERY]}), Results(tmp_path)
    for run in runs:
        finish(results, run, 0.2 * run.d)
    model, trajectory = nn.Linear(2, 2, bias=False), Trajectory(tmp_path / "trajectories" / runs[0].trajectory.name)
    with torch.no_grad():
        for step in range(6):  # the last one is beyond the samples
            model.weight.view(-1)[step - 1 :][:1] += 5 - step if step else 0
            trajectory.add(model, step=step)
    return file


def test_spectra_outlive_their_trajectories(lottery, capsys):
    spectra.main([str(lottery)])
    record = read_measurement(lottery.parent / "spectra_digits.jsonl")
    assert [spectrum["singular_values"] for spectrum in record["spectra"]] == [pytest.approx([4, 3, 2, 1])]
    assert record["dataset"] == "digits"
    assert "versions" in record
    (row,) = cells(capsys.readouterr().out, "FC")
    assert row == ["0", "4", "3", "4", "4"]  # 16, 25 and 29 of 30
    figure = lottery.parent / "plots" / "spectra_digits.png"
    figure.unlink()
    for sample in lottery.parent.glob("trajectories/*/*"):
        sample.unlink()
    spectra.main([str(lottery)])
    assert cells(capsys.readouterr().out, "FC") == [row]
    assert figure.stat().st_size > 20_000
    assert read_measurement(lottery.parent / "spectra_digits.jsonl") == record


def test_without_a_trajectory_it_says_how_to_record_one(lottery):
    for sample in lottery.parent.glob("trajectories/*/*"):
        sample.unlink()
    with pytest.raises(ValueError, match=r"must hold a trajectory of .* on digits, .* with recipes/run\.py"):
        spectra.main([str(lottery)])


def test_spectra_of_a_recipe_without_lottery_subspaces_are_refused(tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text("model: fc\n")
    with pytest.raises(ValueError, match="The recipe must have lottery subspaces, .*tiny.yaml' has none"):
        spectra.main([str(file)])
