"""A sweep by processes of this machine, by dask and by submitit, some of which are killed."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool
from pathlib import Path

import psutil
import pytest
from distributed import Client, LocalCluster

from recipes import run
from recipes.lab import sweep as sweep_module
from recipes.lab.executors import Here, Pool, opened
from recipes.lab.grid import read
from recipes.lab.results import Results
from recipes.lab.sweep import Sweep
from recipes.training.kind import KIND
from tests.recipes.files import RECIPES, results, written


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
PATIENCE = 120.0


@pytest.fixture
def recipe(tmp_path) -> Path:
    settings = ["model: fc", "images: 512", "batch_size: 256", "epochs: 1", "threads: 1", "projection: [full, fastjl]"]
    return written(tmp_path / "tiny.yaml", *settings, "d: [3, 4]", "lr: 0.1", "seed: [0, 1]")


@pytest.fixture
def unreported(monkeypatch):
    monkeypatch.setattr(run, "conclude", lambda *rest: None)


def until(happened, what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(0.05)


@pytest.mark.usefixtures("unreported")
def test_jobs_of_submitit_make_every_run_once(recipe):
    command = [
        str(recipe),
        "--d",
        "3",
        "--projection",
        "fastjl",
        "--workers",
        "2",
        "--executor",
        "slurm:cluster=local",
    ]
    run.main(command)
    made = results(recipe.parent)
    assert made.keys() == {each.name for each in read(recipe).runs if each.d == 3}
    assert len(made) == 2
    assert not list((recipe.parent / "results").glob("*.lock"))
    run.main(command)
    assert results(recipe.parent) == made
    assert len(list((recipe.parent / "jobs").glob("*_result.pkl"))) == 2


def test_a_dask_worker_that_is_killed_loses_nothing_and_no_finished_run_is_made_again(recipe):
    sweep, written_at, pids = Sweep(KIND, read(recipe, {"epochs": "6"}).runs, recipe.parent), {}, []
    folder = recipe.parent / "results"

    def watch() -> None:
        while len(written_at) < len(sweep.runs) and not stopped.is_set():
            for path in folder.glob("*.json"):
                written_at.setdefault(path.stem, path.stat().st_mtime_ns)
            if written_at and not pids:
                pids.append(min(client.run(os.getpid).values()))
                os.kill(pids[0], signal.SIGKILL)
            time.sleep(0.01)

    stopped = threading.Event()
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            sweep.carry_out(client.get_executor(pure=False), workers=2)
        finally:
            stopped.set()
            watcher.join()
    assert pids
    assert results(recipe.parent).keys() == {each.name for each in sweep.runs}
    assert {name: (folder / f"{name}.json").stat().st_mtime_ns for name in written_at} == written_at
    sweep.results.drop_abandoned()
    assert not list(folder.glob("*.lock"))


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_command_that_started_them_and_the_next_one_goes_on(recipe, ending):
    folder, command = recipe.parent / "results", [sys.executable, str(RECIPES / "run.py"), str(recipe)]
    command += ["--workers", "2", "--seed", "0"]
    started = subprocess.Popen([*command, "--epochs", "100000"], stderr=subprocess.PIPE, cwd=recipe.parent)
    until(lambda: len(list(folder.glob("*.lock"))) == 2, "a run of each worker")
    workers = psutil.Process(started.pid).children(recursive=True)
    assert len(workers) >= 2
    started.send_signal(ending)
    _, said = started.communicate(timeout=PATIENCE)
    assert started.returncode == (143 if ending == signal.SIGTERM else -signal.SIGKILL)
    assert "Traceback" not in said.decode()
    until(lambda: not any(_lives(worker) for worker in workers), "the end of the workers")
    if ending == signal.SIGTERM:
        assert not list(folder.glob("*.lock"))
    Sweep(KIND, read(recipe, {"seed": "0"}).runs, recipe.parent).carry_out()
    assert results(recipe.parent).keys() == {each.name for each in read(recipe, {"seed": "0"}).runs}


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_what_a_run_raises_in_a_worker_is_said_in_one_sentence(recipe):
    command = [sys.executable, str(RECIPES / "run.py"), str(recipe), "--executor", "processes", "--batch_size", "9999"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    said = ended.stderr.splitlines()[-1]
    assert said == "`batch_size` must be between 1 and the 512 training images, got 9999."
    assert "Traceback" not in ended.stderr
    assert not list((recipe.parent / "results").glob("*"))


def test_what_a_run_refuses_under_dask_is_said_in_one_sentence_and_the_workers_end(recipe):
    command = [sys.executable, str(RECIPES / "run.py"), str(recipe), "--executor", "dask", "--batch_size", "9999"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2, ended.stderr
    assert "`batch_size` must be between 1 and the 512 training images, got 9999." in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not list((recipe.parent / "results").glob("*"))


def test_what_another_command_holds_is_left_to_it_and_made_once_it_is_free(recipe, capsys):
    runs, held = read(recipe, {"seed": "0"}).runs, Results(recipe.parent)
    assert held.take(runs[0])
    (held.folder / f"{runs[0].name}.lock" / "owner").write_text("another-machine 1")
    run.main([str(recipe), "--seed", "0"])
    made = results(recipe.parent)
    assert made.keys() == {each.name for each in runs[1:]}
    assert "1 of 3 runs have no result yet, or are still held by other processes" in capsys.readouterr().out
    held.release(runs[0])
    run.main([str(recipe), "--seed", "0"])
    again = results(recipe.parent)
    assert again.keys() == {each.name for each in runs}
    assert {name: again[name] for name in made} == made


def test_workers_that_do_not_see_the_output_folder_are_named(recipe, tmp_path):
    class Elsewhere(ThreadPoolExecutor):
        def submit(self, make, kind, group, output):
            return super().submit(make, kind, group, tmp_path / "elsewhere")

    sweep = Sweep(KIND, read(recipe, {"seed": "0"}).runs, recipe.parent)
    with Elsewhere(1) as executor, pytest.raises(ValueError, match="The workers must see the output folder"):
        sweep.carry_out(executor)


def test_a_run_that_another_command_made_a_moment_ago_is_not_held_against_its_followers(dldr, monkeypatch):
    """The other command records the trajectory between the choice of the run and the look at its lock."""
    sgd, *_ = read(dldr).runs
    sweep = Sweep(KIND, read(dldr).runs, dldr.parent)
    passed, take = [], sweep_module._take

    def taken_by_another(kind, run, results):
        if run.name == sgd.name and not passed:
            passed.append(run)
            return False
        return take(kind, run, results)

    monkeypatch.setattr(sweep_module, "_take", taken_by_another)
    sweep.carry_out()
    assert passed
    assert len(results(dldr.parent)) == 3


def threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(2)


def pool() -> ThreadPool:
    return ThreadPool(1)


@pytest.mark.usefixtures("unreported")
@pytest.mark.parametrize("function", ["threads", "pool"])
def test_any_other_executor_or_pool_comes_from_a_function(recipe, function, monkeypatch):
    monkeypatch.setitem(sys.modules, "my_cluster", sys.modules[__name__])
    run.main([str(recipe), "--seed", "0", "--executor", f"my_cluster:{function}"])
    assert results(recipe.parent).keys() == {each.name for each in read(recipe, {"seed": "0"}).runs}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ray", "`--executor` must be one of processes, dask, slurm, or <module>:<function>.*got 'ray'"),
        ("no_such_module:f", "got 'no_such_module:f': No module named"),
        ("processes:a=1", "`--executor` 'processes:a=1' cannot be opened"),
        ("slurm", "`--executor` 'slurm' cannot be opened"),
        ("slurm:cluster=nowhere", "`--executor` 'slurm:cluster=nowhere' cannot be opened"),
        ("math:sqrt", "got 'math:sqrt': "),
        ("os:getcwd", "must return an Executor or a pool with `apply_async`"),
        ("dask:address", "`--executor` must be a name, or name:key=value,key=value, got 'dask:address'"),
    ],
)
def test_an_executor_that_is_none(name, message, tmp_path):
    with pytest.raises(ValueError, match=message), opened(name, 2, tmp_path):
        pass


def test_a_package_that_is_not_installed_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    said = r'needs the package submitit.*pip install -e "\.\[slurm\]"'
    with pytest.raises(ValueError, match=said), opened("slurm", 2, tmp_path):
        pass


def test_a_pool_ends_at_once_or_when_all_is_done():
    with ThreadPool(1) as workers:
        executor = Pool(workers)
        assert executor.submit(lambda x: x + 1, 1).result() == 2
        failed = executor.submit(lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            failed.result()
        executor.shutdown()


def test_here_runs_at_once_and_raises_what_is_raised():
    assert Here().submit(lambda x: x + 1, x=1).result() == 2
    with pytest.raises(KeyboardInterrupt):
        Here().submit(lambda: (_ for _ in ()).throw(KeyboardInterrupt))


def test_a_search_by_two_workers_at_a_time_says_which_runs_it_made(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "my_cluster", sys.modules[__name__])
    lines = ["model: fc", "images: 512", "batch_size: 256", "epochs: 1", "threads: 1", "projection: fastjl", "lr: 0.5"]
    lines += ["d: auto", "threshold: 0.2", "d_max: 16", "max_runs: 6", "seeds: 2"]
    recipe = written(tmp_path / "auto.yaml", *lines)
    run.main([str(recipe), "--workers", "2", "--executor", "my_cluster:threads"])
    (asked,) = read(recipe).searches
    outcome = Results(tmp_path).load(asked)
    assert {asked.run(d, seed).name for d, seed in outcome["made"]} | {asked.name} == results(tmp_path).keys()
    assert len(outcome["made"]) <= 6
