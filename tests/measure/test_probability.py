"""Success probabilities with Wilson's interval, against scipy."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from subspace_peft.measure import success_probability


def table(successes: int, n: int) -> pd.DataFrame:
    return pd.DataFrame({"d": 7, "seed": range(n), "final_accuracy": [0.9] * successes + [0.8] * (n - successes)})


@settings(max_examples=50)
@given(n=st.integers(1, 200), share=st.floats(0, 1), confidence=st.floats(0.01, 0.999))
def test_the_interval_is_scipys(n, share, confidence):
    successes = round(share * n)
    row = success_probability(table(successes, n), 0.85, confidence=confidence).loc[7]
    expected = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    assert (row.runs, row.successes, row.probability) == (n, successes, successes / n)
    assert row.low == pytest.approx(expected.low, abs=1e-9)
    assert row.high == pytest.approx(expected.high, abs=1e-9)
    assert 0 <= row.low <= row.probability + 1e-12
    assert row.probability - 1e-12 <= row.high <= 1


def test_by_d_in_order_and_the_threshold_itself_is_a_success():
    runs = pd.DataFrame({"d": [300, 10, 10, 300.0], "seed": [0, 0, 1, 1], "final_accuracy": [0.9, 0.1, 0.9, 0.95]})
    result = success_probability(runs, 0.9)
    assert result.index.tolist() == [10, 300]
    assert result.index.name == "d"
    assert result.columns.tolist() == ["runs", "successes", "probability", "low", "high", "nan"]
    assert result.successes.tolist() == [1, 2]


def test_a_run_without_a_number_is_a_failure_and_is_shown():
    runs = pd.DataFrame({"d": 5, "seed": range(4), "final_accuracy": [0.9, np.nan, np.inf, 0.2]})
    row = success_probability(runs, 0.5).loc[5]
    assert (row.runs, row.successes, row.nan) == (4, 1, 2)


def test_another_metric_of_which_less_is_better():
    runs = pd.DataFrame({"d": 5, "seed": range(3), "loss": [0.1, 0.5, np.nan]})
    assert success_probability(runs, 0.3, metric="loss", larger_is_better=False).successes.tolist() == [1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"threshold": None}, "`threshold` must be a finite number, got None"),
        ({"threshold": float("nan")}, "`threshold` must be a finite number, got nan"),
        ({"threshold": "0.9"}, "`threshold` must be a finite number, got '0.9'"),
        ({"threshold": 0.9, "confidence": 95}, "`confidence` must lie between 0 and 1, got 95"),
    ],
)
def test_bad_values_are_errors(given, message):
    with pytest.raises(ValueError, match=message):
        success_probability(table(1, 2), **given)
