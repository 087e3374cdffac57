"""Tables of runs: what is left out, what is an error, and the running maximum."""

import numpy as np
import pandas as pd
import pytest

from subspace_peft.measure import intrinsic_dimension, running_maximum, success_probability, threshold_dimension


RUNS = pd.DataFrame(
    [{"d": d, "seed": seed, "final_accuracy": d / 100, "model": "lenet"} for d in (10, 20) for seed in (0, 1)]
)
MEASURES = {
    "success_probability": lambda runs: success_probability(runs, 0.5),
    "threshold_dimension": lambda runs: threshold_dimension(runs, 0.5),
    "intrinsic_dimension": lambda runs: intrinsic_dimension(runs, absolute=0.5),
}
MIXED = {
    "empty": (RUNS[:0], "A table must hold runs, got an empty one"),
    "no rows or columns": (pd.DataFrame(), "A table must hold runs, got an empty one"),
    "no d": (RUNS.drop(columns="d"), "must have a column `d`, got seed, final_accuracy, model"),
    "no seed": (RUNS.drop(columns="seed"), "must have a column `seed`"),
    "no metric": (RUNS.drop(columns="final_accuracy"), "must have a column `final_accuracy`"),
    "full training alone": (RUNS.assign(projection="full"), "got 4 of full training alone"),
    "two models": (RUNS.assign(model=["fc", "lenet"] * 2), "one `model`, got 'fc', 'lenet'; take those of one"),
    "two D": (RUNS.assign(D=[5, 5, 6, 6]), "one `D`, got 5, 6"),
    "two burn-ins": (RUNS.assign(burn_in=[0, 0, 4, 4]), r"one `burn_in`, got 0, 4; .* runs\[runs.burn_in == 0\]"),
    "two projections": (RUNS.assign(projection=["dense", "sparse"] * 2), "one `projection`, got 'dense', 'sparse'"),
    "d = 0": (RUNS.assign(d=0), "`d` must be an integer of at least 1 in every row, got 0"),
    "d = 1.5": (RUNS.assign(d=1.5), "`d` must be an integer of at least 1 in every row, got 1.5"),
    "d missing": (RUNS.assign(d=[1, 2, np.nan, 3]), "`d` must be an integer of at least 1 in every row, got nan"),
    "d in words": (RUNS.assign(d="many"), "`d` must be an integer of at least 1 in every row, got 'many'"),
    "a metric in words": (RUNS.assign(final_accuracy="good"), "`final_accuracy` must be numbers"),
    "the same run twice": (pd.concat([RUNS, RUNS[:1]]), "d = 10, seed = 0 2 times; drop the duplicates"),
    "two rates": (pd.concat([RUNS.assign(lr=1), RUNS.assign(lr=2)]), "d = 10, seed = 0 2 times, which differ in lr"),
}


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
@pytest.mark.parametrize(("runs", "message"), MIXED.values(), ids=MIXED)
def test_a_table_that_is_not_one_of_runs_is_an_error(measure, runs, message):
    with pytest.raises(ValueError, match=message):
        measure(runs)


def test_full_training_is_left_out():
    full = pd.DataFrame([{"d": 0, "seed": 0, "final_accuracy": 1.0, "model": "lenet", "projection": "full"}])
    runs = pd.concat([RUNS.assign(projection="dense"), full])
    assert success_probability(runs, 0.15).index.tolist() == [10, 20]
    assert threshold_dimension(runs, 0.15).d == 20


def test_a_table_is_left_as_it_was():
    runs = pd.concat([RUNS, RUNS.assign(seed=2, final_accuracy=np.nan).iloc[::2]])
    before = runs.copy()
    for measure in [*MEASURES.values(), running_maximum]:
        measure(runs)
    pd.testing.assert_frame_equal(runs, before)


# --------------------------------------------------------------------------------------------- running maximum


def lines(*rows):
    return pd.DataFrame(rows, columns=["d", "seed", "final_accuracy"])


def test_what_a_smaller_d_reached_counts_for_the_larger_ones_of_the_same_seed():
    runs = lines((4, 0, 0.5), (1, 0, 0.2), (2, 0, 0.7), (1, 1, 0.9), (8, 0, 0.8), (2, 1, np.nan), (4, 1, 0.95))
    best = running_maximum(runs)
    assert best.final_accuracy.tolist() == [0.7, 0.2, 0.7, 0.9, 0.8, 0.9, 0.95]
    pd.testing.assert_frame_equal(best.drop(columns="final_accuracy"), runs.drop(columns="final_accuracy"))


def test_the_smallest_d_without_a_number_has_none():
    assert running_maximum(lines((1, 0, np.nan), (2, 0, 0.3))).final_accuracy.isna().tolist() == [True, False]


def test_the_best_loss_is_the_minimum():
    runs = lines((1, 0, 0.3), (2, 0, 0.4), (4, 0, 0.1))
    assert running_maximum(runs, larger_is_better=False).final_accuracy.tolist() == [0.3, 0.3, 0.1]


def test_runs_of_other_settings_and_full_training_are_apart():
    runs = pd.concat(
        [
            lines((1, 0, 0.9), (2, 0, 0.5)).assign(model="fc", projection="basis"),
            lines((1, 0, 0.1), (2, 0, 0.4)).assign(model="lenet", projection="basis"),
            lines((0, 0, 0.2)).assign(model="lenet", projection="full"),
        ]
    )
    best = running_maximum(runs)
    assert best.final_accuracy.tolist() == [0.9, 0.9, 0.1, 0.4, 0.2]
    assert best.index.equals(runs.index)


def test_the_same_run_twice_is_an_error():
    with pytest.raises(ValueError, match="got d = 1, seed = 0 2 times; drop the duplicates"):
        running_maximum(lines((1, 0, 0.5), (1, 0, 0.5)))


def test_a_running_maximum_never_falls_and_makes_success_no_rarer():
    generator = np.random.default_rng(0)
    runs = pd.DataFrame([(d, seed, generator.random()) for seed in range(9) for d in (1, 2, 3, 4)])
    runs.columns = ["d", "seed", "final_accuracy"]
    best = running_maximum(runs)
    assert (best.pivot(index="seed", columns="d", values="final_accuracy").diff(axis=1).iloc[:, 1:] >= 0).all(
        axis=None
    )
    assert (success_probability(best, 0.5).successes >= success_probability(runs, 0.5).successes).all()
