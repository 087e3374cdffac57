"""find_dimension with an executor: several runs at a time, and the same answer for the same runs."""

import multiprocessing
import pickle
import threading
import time
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest

from subspace_peft.measure import RunError
from subspace_peft.measure.workers import Workers
from tests.measure.cases import Flaky, at_least_20, entries, find, killed, no_metric, noisy, step, with_threads


@pytest.fixture(scope="module")
def processes():
    """A context that forks its processes from one that has imported the package."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.measure.cases"])
    return context


def assert_same_answer(first, second):
    pd.testing.assert_frame_equal(first.runs.drop(columns="seconds"), second.runs.drop(columns="seconds"))
    for name in ("d", "interval", "best", "reason"):
        assert getattr(first, name) == getattr(second, name)


# --------------------------------------------------------------------------------------------------- runs at a time


class Together:
    """Let the first runs end once `number` of them are under way, and count the runs under way."""

    def __init__(self, number: int):
        self.barrier, self.lock = threading.Barrier(number, timeout=20), threading.Lock()
        self.number, self.now, self.most, self.calls = number, 0, 0, []

    def __call__(self, d, seed):
        with self.lock:
            self.calls.append((d, seed))
            self.now += 1
            self.most = max(self.most, self.now)
        if seed < self.number:
            self.barrier.wait()
        time.sleep(0.002 * (seed % 3))
        with self.lock:
            self.now -= 1
        return float(d >= 187)


@pytest.mark.parametrize("options", [{}, {"threads": 8, "workers": 4}])
def test_as_many_runs_are_made_at_a_time_as_there_are_workers(options):
    train = Together(4)
    result = with_threads(train, **options)
    assert train.most == 4
    assert sorted(train.calls[:4]) == [(1, 0), (2, 1), (4, 2), (8, 3)]
    assert result.runs.seed.tolist() == list(range(result.cost.runs))
    assert sorted(train.calls, key=lambda call: call[1]) == list(zip(result.runs.d, result.runs.seed, strict=True))
    low, high = result.interval
    assert low <= 187 <= high <= 1.21 * low
    assert 187 <= result.d <= 206
    assert (result.runs.d == result.d).sum() >= 5


@pytest.mark.parametrize("max_runs", [1, 3, 7, 12])
def test_no_more_runs_are_made_than_max_runs(max_runs):
    train = Flaky(0)
    result = with_threads(train, max_runs=max_runs)
    assert len(train.calls) == result.cost.runs == max_runs


class ClientExecutor(Executor):
    """Like that of dask.distributed: its futures never say that they are running, so that any can be cancelled."""

    class Client:
        def nthreads(self):
            return {"tcp://one": 2, "tcp://two": 1}

    def __init__(self, pool: Executor):
        self._client, self._pool, self.submitted = self.Client(), pool, []

    def submit(self, *arguments):
        self.submitted.append(arguments)
        future = Future()
        self._pool.submit(*arguments).add_done_callback(lambda done: self._pass_on(done, future))
        return future

    def _pass_on(self, done, future):
        if done.exception():
            future.set_exception(done.exception())
        else:
            future.set_result(done.result())


def test_the_number_of_workers_of_a_dask_executor_is_that_of_its_threads():
    train = Together(3)
    with ThreadPoolExecutor(8) as pool:
        find(train, d_max=1000, executor=ClientExecutor(pool))
    assert train.most == 3


@pytest.fixture
def failure_seen(monkeypatch):
    """Set when a search has seen that a run failed."""
    seen, cancel = threading.Event(), Workers.cancel
    monkeypatch.setattr(Workers, "cancel", lambda self, *arguments: seen.set() or cancel(self, *arguments))
    return seen


def test_runs_that_dask_has_started_are_kept_when_another_fails_which_is_then_made_again(tmp_path, failure_seen):
    raised, all_three = threading.Event(), threading.Barrier(3)

    def train(d, seed):
        if seed < 3 and not raised.is_set():
            all_three.wait(timeout=60)
            if seed == 1:
                raised.set()
                raise ArithmeticError
            assert failure_seen.wait(timeout=60)
        return float(d >= 187)

    with ThreadPoolExecutor(3) as pool:
        executor = ClientExecutor(pool)
        options = {"d_max": 1000, "executor": executor, "file": tmp_path / "search.jsonl"}
        with pytest.raises(RunError) as caught:
            find(train, **options)
        assert caught.value.runs.seed.tolist() == [0, 2]
        result = find(train, **options)
    assert result.cost.runs == len(executor.submitted) - 1
    assert len(set(executor.submitted)) == len(executor.submitted)  # dask would answer an equal call with the error


def test_runs_in_processes(processes):
    with ProcessPoolExecutor(2, mp_context=processes) as executor:
        result = find(at_least_20, d_max=100, executor=executor)
        low, high = result.interval
        assert low <= 20 <= high <= 1.21 * low
        assert (result.runs.success == (result.runs.d >= 20)).all()
        assert result.runs.metric.dtype == float
        with pytest.raises(RunError, match="failed: TypeError: .*The 0 finished runs are kept"):
            find(no_metric, d_max=100, executor=executor)


# ----------------------------------------------------------------------------------- the same answer for the same runs


@pytest.mark.parametrize("train", [step(187), noisy(187, 0.1)], ids=["step", "noisy"])
def test_one_worker_makes_the_runs_that_this_process_makes(train, tmp_path):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    result = with_threads(train, workers=1, file=first)
    assert_same_answer(result, find(train, d_max=1000, file=second))
    assert entries(first) == entries(second)
    assert all("metric" in entry for entry in entries(first))


@pytest.mark.parametrize("seed", range(4))
def test_the_answer_does_not_depend_on_the_order_in_which_runs_end(seed, tmp_path):
    file, train = tmp_path / "search.jsonl", noisy(187, 0.1)
    result = with_threads(lambda d, seed: time.sleep(0.004 * (seed % 4)) or train(d, seed), file=file)
    header, *lines = file.read_text().splitlines()
    for order in (np.random.default_rng(seed).permutation(len(lines)), np.arange(len(lines))[::-1]):
        file.write_text("\n".join([header, *(lines[at] for at in order)]) + "\n")
        never = Flaky(1)
        assert_same_answer(find(never, d_max=1000, file=file), result)
        assert not never.calls


# ------------------------------------------------------------------------------------------------------ runs that fail


def test_a_run_that_raises_ends_the_search_and_the_runs_that_had_started_are_kept(tmp_path, failure_seen):
    file, raised, started = tmp_path / "search.jsonl", threading.Event(), []
    all_four = threading.Barrier(4)

    def train(d, seed):
        started.append((d, seed))
        if seed < 4 and not raised.is_set():
            all_four.wait(timeout=60)
            if seed == 1:
                raised.set()
                raise ArithmeticError("the loss is gone")
            assert failure_seen.wait(timeout=60)
        return float(d >= 187)

    message = r"The run of d = 2, seed = 1 failed: ArithmeticError: the loss is gone. The 3 finished runs are kept in"
    with pytest.raises(RunError, match=message) as caught:
        with_threads(train, file=file)
    assert (caught.value.d, caught.value.seed) == (2, 1)
    assert caught.value.runs.d.tolist() == [1, 4, 8]
    assert caught.value.runs.seed.tolist() == [0, 2, 3]
    assert isinstance(caught.value.__cause__, ArithmeticError)
    assert sorted(started) == [(1, 0), (2, 1), (4, 2), (8, 3)]
    result = with_threads(train, file=file)
    assert started.count((2, 1)) == 2
    assert len(set(started)) == len(started) - 1 == result.cost.runs


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
def test_runs_that_had_not_started_are_cancelled(error):
    started = []

    def train(d, seed):
        started.append(seed)
        if seed == 0:
            raise error
        time.sleep(0.2)
        return 1.0

    with pytest.raises(RunError if error is ArithmeticError else KeyboardInterrupt):
        with_threads(train, threads=1, workers=4)
    assert started in ([0], [0, 1])  # the thread may take up the second run before the first is known to have failed


def test_a_process_that_dies_is_a_run_that_failed(processes):
    with ProcessPoolExecutor(2, mp_context=processes) as executor:
        with pytest.raises(RunError, match="failed: BrokenProcessPool: .*The 0 finished runs are kept"):
            find(killed, d_max=100, executor=executor)
        with pytest.raises(RunError, match="The run of d = 1, seed = 0 failed: BrokenProcessPool"):
            find(at_least_20, d_max=100, executor=executor)


def test_an_executor_that_was_shut_down_is_a_run_that_failed():
    with ThreadPoolExecutor(2) as executor:
        pass
    with pytest.raises(RunError, match="d = 1, seed = 0 failed: RuntimeError: cannot schedule new futures after shut"):
        find(step(187), d_max=1000, executor=executor)


def test_the_error_of_a_run_passes_between_processes():
    with pytest.raises(RunError) as caught:
        find(Flaky(3), d_max=1000)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.d, copy.seed) == (str(caught.value), 4, 2)
    pd.testing.assert_frame_equal(copy.runs, caught.value.runs)


# ---------------------------------------------------------------------------------------------------------- bad values


class Anonymous(Executor):
    """An executor that does not say how many workers it has."""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"executor": 4}, "`executor` must be a concurrent.futures.Executor, got 4; give one, such as"),
        ({"executor": ThreadPoolExecutor}, "`executor` must be a concurrent.futures.Executor, got <class"),
        ({"workers": 4}, "`workers` must come with an `executor`, got workers=4 alone; give one, such as"),
        ({"executor": Anonymous()}, "`workers` must be given where .*, got a Anonymous; give the number of runs"),
        ({"executor": Anonymous(), "workers": 0}, "`workers` must be an integer of at least 1, got 0"),
        ({"executor": Anonymous(), "workers": 1.5}, "`workers` must be an integer of at least 1, got 1.5"),
        ({"executor": Anonymous(), "workers": True}, "`workers` must be an integer of at least 1, got True"),
    ],
)
def test_bad_values_are_errors_before_any_run(options, message, tmp_path):
    flaky, file = Flaky(1), tmp_path / "search.jsonl"
    with pytest.raises(ValueError, match=message):
        find(flaky, d_max=1000, file=file, **options)
    assert not flaky.calls
    assert not file.exists()


def test_a_function_that_processes_cannot_import_is_an_error_before_any_run(tmp_path):
    file = tmp_path / "search.jsonl"
    with ProcessPoolExecutor(2) as executor:
        with pytest.raises(ValueError, match=r"`train` must be picklable for a ProcessPoolExecutor, got <function .*"):
            find(lambda d, seed: 1.0, d_max=1000, executor=executor, file=file)
        assert not executor._processes
    assert not file.exists()


def test_the_bar_counts_finished_runs(capsys):
    result = with_threads(step(20), d_max=100, progress=True)
    assert f"{result.cost.runs}/{result.cost.runs}" in capsys.readouterr().err
