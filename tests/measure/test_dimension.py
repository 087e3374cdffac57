"""Threshold training dimension and intrinsic dimension of tables for which they are known."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.isotonic import isotonic_regression

from subspace_peft.measure import intrinsic_dimension, threshold_dimension
from subspace_peft.measure.dimension import isotonic


def table(by_d: dict[int, list[float]], **settings) -> pd.DataFrame:
    rows = [(d, seed, value) for d, values in by_d.items() for seed, value in enumerate(values)]
    return pd.DataFrame(rows, columns=["d", "seed", "final_accuracy"]).assign(**settings)


LENET = {  # best of 100 epochs, one seed: Gargiulo 2023, LeNet on MNIST
    160: 0.8903, 165: 0.8901, 170: 0.9028, 175: 0.9010, 180: 0.8931, 185: 0.8953, 190: 0.8937, 195: 0.9106, 200: 0.9228
}  # fmt: skip
PUBLISHED = table({d: [accuracy] for d, accuracy in LENET.items()})


# ---------------------------------------------------------------------------------------------- which d it is


def test_first_crossing_and_isotonic_differ_where_the_table_falls_again_and_say_so():
    first, monotone = (intrinsic_dimension(PUBLISHED, absolute=0.9, method=m) for m in ("first_crossing", "isotonic"))
    assert (first.d, monotone.d) == (170, 195)
    assert "the first d of the grid at which the mean final_accuracy reaches 0.9, whatever larger d do" in str(first)
    assert "made monotone in d" in str(monotone)


def test_the_mean_counts_and_not_a_lucky_run():
    runs = table({10: [0.95, 0.7, 0.7], 20: [0.9, 0.9, 0.91], 30: [0.99] * 3})
    assert intrinsic_dimension(runs, absolute=0.9).d == 20


def test_d_int90_is_of_the_full_training_in_the_table_or_given():
    runs = table({10: [0.80, 0.82], 20: [0.86, 0.88], 40: [0.95, 0.95]}, projection="dense", model="fc", lr=1.0)
    full = table({0: [0.94, 0.96]}, projection="full", model="fc", lr=0.1)
    result = intrinsic_dimension(pd.concat([runs, full]))
    assert (result.d, result.threshold) == (20, pytest.approx(0.855))
    assert intrinsic_dimension(runs, baseline=full).threshold == result.threshold
    assert intrinsic_dimension(runs, fraction=0.9, baseline=0.95).threshold == result.threshold
    assert intrinsic_dimension(runs, fraction=0.8, baseline=1.0).d == 10
    assert intrinsic_dimension(pd.concat([runs, full]), absolute=0.9).d == 40


def test_final_and_best_epochs_have_their_own():
    runs = table({10: [0.8, 0.8], 20: [0.95, 0.95]}).assign(best_accuracy=[0.91, 0.91, 0.97, 0.97])
    assert intrinsic_dimension(runs, absolute=0.9).d == 20
    assert intrinsic_dimension(runs, absolute=0.9, metric="best_accuracy").d == 10


def test_a_loss_has_its_dimensions_where_it_is_small():
    runs = table({10: [0.5, 0.5], 20: [0.2, 0.3], 30: [0.1, np.nan]})
    result = intrinsic_dimension(runs, absolute=0.3, larger_is_better=False)
    assert (result.d, result.best) == (20, (0.1, 30))
    assert threshold_dimension(runs, 0.2, delta=0.5, larger_is_better=False).d == 20


def test_larsens_d_star_is_reached_by_nine_of_ten():
    runs = table({8: [0.95] * 8 + [0.5] * 2, 16: [0.95] * 9 + [0.5], 32: [0.95] * 10})
    result = threshold_dimension(runs, 0.9, delta=0.1)
    assert result.d == 16
    assert "the share of runs with final_accuracy >= 0.9 reaches 0.9" in str(result)
    assert threshold_dimension(runs, 0.9, delta=0.3).d == 8
    assert threshold_dimension(runs, 0.9, delta=0.01).d == 32
    assert threshold_dimension(table({4: [0.1, 1, 1]}), 0.9, delta=1 / 3).d == 4


def test_never_reached_says_so_with_the_best_seen():
    runs = table({10: [0.1, 0.2], 20: [0.6, 0.4], 40: [0.5, 0.5]})
    for result in (intrinsic_dimension(runs, absolute=0.9), threshold_dimension(runs, 0.9)):
        assert (result.d, result.interval, result.best, result.largest) == (None, (None, None), (0.6, 20), 40)
        assert str(result).startswith("no d up to 40 (95 % interval: above 40)")
        assert "best seen 0.6 at d = 20" in str(result)


def test_runs_without_a_number_count_as_the_worst_and_are_shown():
    runs = table({10: [0.1, 0.1], 20: [0.95, np.nan], 40: [0.95, 0.96]})
    for result in (intrinsic_dimension(runs, absolute=0.9), threshold_dimension(runs, 0.9)):
        assert (result.d, result.nan) == (40, 1)
        assert "1 runs gave no number and count as the worst" in str(result)
    assert intrinsic_dimension(runs, absolute=0.525).d == 20
    nothing = intrinsic_dimension(table({10: [np.nan] * 2, 20: [np.inf] * 2}), absolute=0.5, method="isotonic")
    assert (nothing.d, nothing.best) == (None, None)
    assert "no run gave a number" in str(nothing)


# ------------------------------------------------------------------------------------------------- interval


def test_the_bootstrap_of_three_runs_is_the_one_on_paper():
    """Resamples of (0, 0, 1) have a mean of 1/3 or more with probability 1 - (2/3)^3 = 70.4 %."""
    runs = table({10: [0, 0, 1], 20: [1, 1, 1]})

    def interval(confidence):
        return intrinsic_dimension(runs, absolute=1 / 3, confidence=confidence, resamples=20_000).interval

    assert interval(0.36) == (10, 10)  # its upper end is the 68th percentile
    assert interval(0.46) == (10, 20)  # the 73rd percentile


def test_above_the_largest_d_is_an_end_of_the_interval():
    result = intrinsic_dimension(table({10: [0, 0, 0], 20: [0, 0, 1]}), absolute=1 / 3)
    assert (result.d, result.interval) == (20, (20, None))
    assert "interval: 20 to above 20" in str(result)


def test_runs_that_all_agree_leave_no_doubt():
    result = intrinsic_dimension(table({10: [0.1] * 3, 20: [0.9] * 3}), absolute=0.9)
    assert result.interval == (20, 20)


def test_there_is_no_interval_where_a_d_was_run_once():
    assert intrinsic_dimension(PUBLISHED, absolute=0.9).interval is None
    assert "no interval: a d around it was run once" in str(intrinsic_dimension(PUBLISHED, absolute=0.9))
    far = table({5: [0.1], 10: [0.2, 0.2], 20: [0.9, 0.95], 80: [0.99]})
    assert intrinsic_dimension(far, absolute=0.9).interval == (20, 20)
    assert intrinsic_dimension(far, absolute=0.97).interval is None


def test_the_interval_holds_the_truth_as_often_as_it_should():
    """Accuracy d / 100 with noise, d = 42, 44 ... 58: the mean crosses 0.5 at d = 50."""
    grid, held = np.arange(42, 60, 2), 0
    for trial in range(100):
        noise = 0.02 * np.random.default_rng(trial).standard_normal((len(grid), 10))
        runs = table({int(d): list(d / 100 + row - 1e-12) for d, row in zip(grid, noise, strict=True)})
        low, high = intrinsic_dimension(runs, absolute=0.499, method="isotonic", resamples=300).interval
        held += low <= 50 <= high
    assert held >= 90


def test_the_same_seed_gives_the_same_interval():
    generator = np.random.default_rng(0)
    runs = table({d: list(generator.normal(d / 100, 0.05, 5)) for d in range(30, 70, 2)})
    first = intrinsic_dimension(runs, absolute=0.5)
    assert first == intrinsic_dimension(runs.sample(frac=1, random_state=0), absolute=0.5)
    assert first.interval[0] < first.interval[1]


# ------------------------------------------------------------------------------------------------- isotonic


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.floats(-1, 1), st.integers(1, 9)), min_size=1, max_size=12),
    st.lists(st.floats(-1, 1), min_size=12, max_size=12),
)
def test_monotone_curves_are_scikit_learns(points, others):
    means, weights = (np.array(column, float) for column in zip(*points, strict=True))
    both = np.column_stack([means, others[: len(means)]])
    fitted = isotonic(both, weights)
    for column in (0, 1):
        expected = isotonic_regression(both[:, column], sample_weight=weights)
        np.testing.assert_allclose(fitted[:, column], expected, atol=1e-9)


# --------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "`fraction` needs the metric of full training, and the table has no rows with projection 'full'; give"),
        (
            {"fraction": 0.9, "absolute": 0.9},
            "Only one of `fraction` and `absolute` may be given, got 0.9 and 0.9; drop one",
        ),
        (
            {"fraction": 0.9, "larger_is_better": False},
            "`fraction` needs a metric of which more is better; give `absolute` for",
        ),
        ({"baseline": float("nan")}, "`baseline` must be a finite number, got nan"),
        ({"baseline": -40.0}, "`fraction` needs a metric of full training above 0, of which a share is less, got -40"),
        ({"baseline": PUBLISHED[:0]}, "`baseline` must have rows and a column `final_accuracy`"),
        ({"baseline": PUBLISHED.assign(model="fc")}, "one `model`, got 'lenet', 'fc'; take the runs of one"),
        ({"absolute": float("inf")}, "`absolute` must be a finite number, got inf"),
        ({"absolute": 0.9, "method": "spline"}, "`method` must be one of first_crossing, isotonic, got 'spline'"),
        ({"absolute": 0.9, "confidence": 1}, "`confidence` must lie between 0 and 1, got 1"),
        ({"absolute": 0.9, "metric": "best_accuracy"}, "must have a column `best_accuracy`"),
    ],
)
def test_bad_values_are_errors(given, message):
    with pytest.raises(ValueError, match=message):
        intrinsic_dimension(PUBLISHED.assign(model="lenet"), **given)


def test_delta_is_a_share():
    with pytest.raises(ValueError, match="`delta` must lie between 0 and 1, got 1"):
        threshold_dimension(PUBLISHED, 0.9, delta=1)


def test_full_training_of_another_model_is_no_baseline():
    full = table({0: [0.9]}, projection="full", model="fc")
    with pytest.raises(ValueError, match="Full training and runs in a subspace must be of one `model`"):
        intrinsic_dimension(pd.concat([PUBLISHED.assign(projection="dense", model="lenet"), full]))


def test_full_training_that_gave_no_number_is_no_baseline():
    full = pd.DataFrame({"final_accuracy": [0.9, np.nan]})
    with pytest.raises(ValueError, match="1 of 2 gave none; give `baseline`"):
        intrinsic_dimension(PUBLISHED, baseline=full)


def test_a_run_without_a_seed_is_an_error():
    runs = table({10: [0.1, 0.2]})
    with pytest.raises(ValueError, match="`seed` must be given in every row, 1 of 2 have none"):
        intrinsic_dimension(runs.assign(seed=[0, np.nan]), absolute=0.5)
