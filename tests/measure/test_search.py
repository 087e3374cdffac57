"""find_dimension on curves whose d is known, steps and noisy ones, and with whatever can go wrong."""

import importlib
import math
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from subspace_peft.measure import RunError, Search, SearchResult, success_probability
from tests.measure.cases import Flaky, find, step


def probit(truth: int, width: float, probability: float, seed: int):
    """Success with the given probability at `truth`, by the normal distribution of ln d, whose sd is the width."""
    generator, quantile = np.random.default_rng(seed), norm.ppf(probability)
    return lambda d, seed: float(generator.random() < norm.cdf(math.log(d / (truth - 0.5)) / width + quantile))


# ------------------------------------------------------------------------------------------------------ step functions


@settings(max_examples=15)
@given(st.data())
def test_a_step_is_found_to_the_last_d(data):
    d_max = data.draw(st.integers(1, 300))
    d_min = data.draw(st.integers(1, d_max))
    truth = data.draw(st.integers(d_min, d_max))
    result = find(step(truth), d_max=d_max, d_min=d_min, resolution=0)
    assert (result.d, result.interval) == (truth, (truth, truth))
    assert (result.runs.d == truth).sum() >= 5


@settings(max_examples=15)
@given(truth=st.integers(1, 45_000))  # next to d_max the interval goes beyond it, and has no end
def test_a_step_lies_in_the_interval_and_within_the_resolution_of_d(truth):
    result = find(step(truth), d_max=50_000, resolution=0.1)
    low, high = result.interval
    assert low <= truth <= high <= max(1.21 * low, result.d)
    assert truth <= result.d <= math.ceil(1.1 * truth)
    at_d = result.runs[result.runs.d == result.d]
    assert len(at_d) >= 5
    assert at_d.success.all()
    assert result.cost.runs < 40


def test_runs_are_told_in_their_order_with_a_seed_each():
    calls = []

    def train(d, seed):
        calls.append((d, seed))
        return d / 10

    result = find(train, threshold=5, d_max=1000, seeds=7)
    assert list(result.runs.columns) == ["d", "seed", "metric", "success", "seconds"]
    assert list(zip(result.runs.d, result.runs.seed, strict=True)) == calls
    assert result.runs.seed.tolist() == list(range(len(calls)))
    assert result.runs.d[:7].tolist() == [1, 2, 4, 8, 16, 32, 64]
    assert (result.runs.metric == result.runs.d / 10).all()
    assert (result.runs.success == (result.runs.d >= 50)).all()
    assert (result.runs.d == result.d).sum() >= 7
    assert result.cost[:2] == (len(calls), sum(d for d, _ in calls))
    assert success_probability(result.runs, 5, metric="metric").loc[result.d].probability == 1


def test_each_run_follows_from_those_before_it():
    doublings = [1, 2, 4, 8, 16, 32, 64, 128, 256]
    turns = [194, 81, 281, 161, 122, 256, 185, 147, 256, 194, 154, 213, 185, 169, 213, 194, 194, 194, 185]
    assert find(step(187), d_max=1000).runs.d.tolist() == doublings + turns


def test_the_result_has_its_former_name_too():
    assert isinstance(find(step(1), d_max=1), SearchResult)
    assert Search is SearchResult


def test_a_loss_is_to_fall_to_the_threshold():
    result = find(lambda d, seed: 100 / d, threshold=1, d_max=1000, resolution=0, larger_is_better=False)
    assert (result.d, result.best) == (100, (pytest.approx(100 / result.runs.d.max()), result.runs.d.max()))


def test_one_run_too_few_at_a_small_d_and_one_divergence_do_not_mislead():
    def train(d, seed):
        return {3: 1.0, 9: math.nan, 12: math.nan}.get(seed, float(d >= 150))

    result = find(train, d_max=1000)
    low, high = result.interval
    assert low <= 150 <= high
    assert 150 <= result.d <= 165


def test_the_search_is_the_same_every_time():
    first, second = (find(probit(90, 0.2, 0.5, 0), d_max=1000) for _ in range(2))
    pd.testing.assert_frame_equal(first.runs.drop(columns="seconds"), second.runs.drop(columns="seconds"))
    assert (first.d, first.interval) == (second.d, second.interval)


# --------------------------------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize(
    ("width", "options"),
    [
        (0.03, {}),
        (0.1, {}),
        (0.3, {"resolution": 0.3}),
        (0.05, {"probability": 0.9, "resolution": 0.2, "confidence": 0.8}),
    ],
)
def test_the_interval_holds_the_truth_as_often_as_it_says(width, options):
    confidence, held, runs = options.get("confidence", 0.95), [], []
    for seed in range(40):
        train = probit(187, width, options.get("probability", 0.5), seed)
        result = find(train, d_max=40_000, **options)
        low, high = (40_001 if end is None else end for end in result.interval)
        assert low <= (result.d or 40_001) <= high
        held.append(low <= 187 <= high)
        runs.append(result.cost.runs)
    assert np.mean(held) >= confidence - 2 * math.sqrt(confidence * (1 - confidence) / 40)
    assert np.mean(runs) < 45


# ------------------------------------------------------------------------------------------------------- no d suffices


def test_a_threshold_that_no_d_reaches_says_so_with_the_best_seen():
    result = find(lambda d, seed: d / 1000, d_max=64)
    assert (result.d, result.interval, result.best) == (None, (None, None), (0.064, 64))
    assert (result.runs.d == 64).sum() >= 5
    assert result.cost.runs < 20
    assert str(result).startswith(
        "no d up to 64 (95 % interval: above 64) reaches 0.5 with probability 0.5; best seen"
    )
    assert "best seen 0.064 at d = 64" in str(result)


def test_a_threshold_that_is_reached_from_time_to_time_leaves_the_interval_open():
    result = find(lambda d, seed: float(d == 64 and seed % 5 == 0), d_max=64)
    assert result.d is None
    assert result.interval[1] is None


def test_the_smallest_d_suffices():
    result = find(step(1), d_max=1000, d_min=10)
    assert (result.d, result.interval, result.cost.runs) == (10, (10, 10), 5)
    assert "no d below `d_min` was tried" in str(result)


def test_runs_without_a_number_are_failures_and_are_shown():
    result = find(lambda d, seed: [math.nan, math.inf, -math.inf][seed % 3] if d < 8 else 1.0, d_max=100)
    assert result.d == 8
    failures = result.runs.metric.isna()
    assert not result.runs.success[failures].any()
    assert f"{failures.sum()} runs gave no number and count as failures" in str(result)
    nothing = find(lambda d, seed: math.nan, d_max=16)
    assert (nothing.d, nothing.best) == (None, None)
    assert "no run gave a number" in str(nothing)


def test_the_last_run_allowed_ends_it_and_the_interval_is_as_wide_as_it_is():
    result = find(step(700), d_max=1000, max_runs=12)
    assert result.cost.runs == 12
    assert result.interval[1] is None or result.interval[1] > 1.21 * result.interval[0]
    assert "the search ended at `max_runs` = 12, before the interval was within ± 10 % with 5 runs at d; raise" in str(
        result
    )
    started = find(step(700), d_max=1000, max_runs=3)
    assert (started.d, started.interval[1]) == (None, None)
    assert "no d up to 4 " in str(started)


def test_an_interval_that_reaches_above_d_max_has_no_end():
    result = find(step(100), d_max=100)
    assert (result.d, result.interval[1]) == (100, None)
    assert str(result).endswith("the interval reaches above `d_max`, and has no end there")


def test_the_outcome_in_words():
    text = str(find(step(100), d_max=1000))
    assert text.startswith("d = 10")
    for part in ("95 % interval: ", "reaches 0.5 with probability 0.5", "runs, sum of d ", "within ± 10 %"):
        assert part in text


def test_progress(capsys):
    find(step(20), d_max=100)
    assert capsys.readouterr().err == ""
    find(step(20), d_max=100, progress=True)
    assert "run/s" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- errors


def test_a_run_that_raises_is_named_and_the_others_are_kept():
    message = "The run of d = 16, seed = 4 failed: ArithmeticError: the loss is gone. The 4 finished runs are kept in"
    with pytest.raises(RunError, match=message) as caught:
        find(Flaky(5), d_max=1000)
    assert (caught.value.d, caught.value.seed) == (16, 4)
    assert caught.value.runs.d.tolist() == [1, 2, 4, 8]
    assert isinstance(caught.value.__cause__, ArithmeticError)


@pytest.mark.parametrize("returned", [None, "good", [0.5]])
def test_no_number_is_a_run_that_failed(returned):
    with pytest.raises(RunError, match="The run of d = 1, seed = 0 failed"):
        find(lambda d, seed: returned, d_max=10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": None}, "`threshold` must be a finite number, got None"),
        ({"threshold": math.nan}, "`threshold` must be a finite number, got nan"),
        ({"threshold": True}, "`threshold` must be a finite number, got True"),
        ({"d_max": 3, "d_min": 4}, "`d_max` must be at least `d_min` = 4, got 3; raise it"),
        ({"d_max": 0}, "`d_max` must be an integer of at least 1, got 0"),
        ({"d_max": 10.5}, "`d_max` must be an integer of at least 1, got 10.5"),
        ({"d_min": 0}, "`d_min` must be an integer of at least 1, got 0"),
        ({"seeds": 0}, "`seeds` must be an integer of at least 1, got 0"),
        ({"max_runs": 0}, "`max_runs` must be an integer of at least 1, got 0"),
        ({"probability": 1}, "`probability` must lie between 0 and 1, got 1"),
        ({"confidence": 95}, "`confidence` must lie between 0 and 1, got 95"),
        ({"resolution": -0.1}, "`resolution` must be at least 0, got -0.1"),
        ({"resolution": None}, "`resolution` must be a finite number, got None"),
    ],
)
def test_bad_values_are_errors_before_any_run(options, message, tmp_path):
    flaky, file = Flaky(1), tmp_path / "search.jsonl"
    with pytest.raises(ValueError, match=message):
        find(flaky, **{"d_max": 1000, "file": file} | options)
    assert not flaky.calls
    assert not file.exists()


def test_without_pandas_the_error_says_what_to_install(monkeypatch):
    for module in [name for name in sys.modules if name.startswith("subspace_peft.measure")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match=r'needs pandas; pip install "subspace-peft\[measure\]"'):
        importlib.import_module("subspace_peft.measure")


def test_train_must_be_a_function():
    with pytest.raises(ValueError, match="`train` must be a function of d and seed that returns a metric, got 0.9"):
        find(0.9, d_max=10)
