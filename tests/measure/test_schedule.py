"""Which runs a search makes beside those under way, and what it says of a set of runs."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subspace_peft.measure.curve import Curve
from subspace_peft.measure.schedule import Schedule
from subspace_peft.measure.search_file import Proposal, Run
from tests.measure.cases import noisy


def schedule(d_max: int = 1000, seeds: int = 5, max_runs: int = 60) -> Schedule:
    return Schedule(Curve(0.5, 1, d_max, 0.1), seeds, 0.95, 0.1, max_runs)


def made(*outcomes: tuple[int, bool]) -> list[Run]:
    return [Run(d, seed, float(success), success, 1.0) for seed, (d, success) in enumerate(outcomes)]


def proposals(plan: Schedule, runs: list[Run], number: int) -> list[int | None]:
    """The d of the proposals in a row, while no run ends."""
    under_way, proposed = [], []
    for seed in range(len(runs), len(runs) + number):
        proposed.append(plan.propose(runs, under_way))
        if proposed[-1] is None:
            break
        under_way.append(Proposal(proposed[-1], seed))
    return proposed


DOUBLED = [(1, False), (2, False), (4, False), (8, False), (16, False), (32, True)]
SETTLED = [*DOUBLED, *[(23, False)] * 6, *[(24, True)] * 3, *[(25, True)] * 6]


def test_the_next_doublings_are_proposed_until_a_run_succeeds():
    assert proposals(schedule(), [], 5) == [1, 2, 4, 8, 16]
    assert proposals(schedule(), made((1, False), (2, False)), 3) == [4, 8, 16]


def test_nothing_is_proposed_beyond_the_last_doubling():
    assert proposals(schedule(d_max=6), [], 9) == [1, 2, 4, 6, None]
    assert proposals(schedule(d_max=6), made((1, False), (2, False), (4, False), (6, False)), 2) == [6, 6]


def test_a_doubling_that_succeeds_ends_the_doubling_whatever_is_under_way():
    under_way = [Proposal(1, 0), Proposal(2, 1), Proposal(8, 3)]
    assert schedule().propose([Run(4, 2, 1.0, True, 1.0)], under_way) < 16


@pytest.mark.parametrize(("d", "success"), [(100, True), (28, True), (18, False), (3, False)])
def test_a_run_under_way_counts_with_its_likeliest_outcome(d, success):
    runs = made(*DOUBLED)
    likeliest = [*runs, Run(d, len(runs), 0.0, success, 0.0)]
    assert schedule().propose(runs, [Proposal(d, len(runs))]) == schedule().look(likeliest).next


def test_chances_are_those_of_a_fine_grid():
    """Bayes' rule by brute force, as for the quantiles."""
    d, success = np.array([10, 20, 40, 80, 60, 70]), np.array([0, 0, 0, 1, 0, 1])
    x = np.linspace(math.log(5), math.log(2000), 4001)
    s = np.geomspace(0.025, 0.5, 10)

    def chance(at):
        z = (np.log(at)[:, None, None] - x[:, None]) / s + math.log(0.69 / 0.29)
        return 0.01 + 0.98 / (1 + np.exp(-z))

    posterior = np.where(success[:, None, None], chance(d), 1 - chance(d)).prod(0)
    at = np.array([15, 50, 65, 75, 90, 300])
    expected = (chance(at) * posterior).sum((1, 2)) / posterior.sum()
    result = Curve(probability=0.7, d_min=10, d_max=1000, resolution=0.1).chances(d, success, at)
    np.testing.assert_allclose(result, expected, atol=0.02)
    assert (np.diff(result) > 0).all()


def test_no_more_runs_are_proposed_than_it_takes_if_they_end_as_is_likely():
    runs = made(*SETTLED)
    lacking = 5 - sum(run.d == 24 for run in runs)
    assert lacking == 2
    assert proposals(schedule(), runs, 9) == [24, 24, None]
    assert schedule().look([*runs, *[Run(24, len(runs) + i, 1.0, True, 1.0) for i in range(2)]]).reason


def test_runs_under_way_count_towards_max_runs():
    assert proposals(schedule(max_runs=4), [], 9) == [1, 2, 4, 8, None]
    assert proposals(schedule(max_runs=8), made(*DOUBLED), 9)[2:] == [None]


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(1, 1000), st.booleans()), min_size=1, max_size=30), st.randoms())
def test_what_runs_say_does_not_depend_on_the_order_in_which_they_ended(outcomes, random):
    runs = made(*outcomes)
    shuffled = random.sample(runs, len(runs))
    assert schedule().look(runs) == schedule().look(shuffled)
    under_way = [Proposal(7, len(runs)), Proposal(70, len(runs) + 1)]
    assert schedule().propose(runs, under_way) == schedule().propose(shuffled, under_way)


def simulated(train, workers: int, generator: np.random.Generator) -> tuple[list[Run], int]:
    """The runs of a search in which any run under way may end next, and its time in units of the time of a run."""
    plan, runs, under_way, rounds = schedule(d_max=40_000), [], [], 0.0
    while True:
        while len(under_way) < workers:
            d = plan.propose(runs, under_way)
            if d is None:
                break
            under_way.append(Proposal(d, len(runs) + len(under_way)))
        if not under_way:
            return runs, rounds
        rounds += 1 / len(under_way)
        proposal = under_way.pop(generator.integers(len(under_way)))
        metric = train(*proposal)
        runs.append(Run(*proposal, metric, bool(metric), 1.0))


@pytest.mark.parametrize("width", [0.03, 0.15])
def test_with_four_workers_the_interval_holds_the_truth_as_often_and_the_search_is_faster(width):
    generator, held, runs, rounds = np.random.default_rng(0), [], [], []
    for truth in np.geomspace(100, 300, 15).astype(int):
        search, time = simulated(noisy(int(truth), width), 4, generator)
        assert sorted(run.seed for run in search) == list(range(len(search)))
        assert len(search) <= 60
        outlook = schedule(d_max=40_000).look(search)
        held.append(outlook.low <= truth <= outlook.high)
        runs.append(len(search))
        rounds.append(time)
    assert np.mean(held) >= 0.95 - 2 * math.sqrt(0.95 * 0.05 / 15)
    assert np.mean(runs) < 50
    assert np.mean(rounds) < 15
