"""Executors: where runs are made, in this process, in others of this machine, or on a cluster.

processes                     a ProcessPoolExecutor of this machine
dask                          dask.distributed: processes of this machine, or `dask:address=tcp://host:8786`
slurm                         submitit, a job a run: `slurm:slurm_partition=gpu,gpus_per_node=1,timeout_min=60`
<module>:<function>           what that function of yours returns: any Executor, or a pool such as Ray's
"""

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch


class Here(Executor):
    """Makes each run when it is submitted, in this process."""

    def submit(self, fn, /, *args, **kwargs) -> Future:
        future = Future()
        future.set_result(fn(*args, **kwargs))
        return future


class Pool(Executor):
    """A pool with `apply_async`, as multiprocessing and `ray.util.multiprocessing` have it, as an Executor."""

    def __init__(self, pool: Any):
        self.pool = pool

    def submit(self, fn, /, *args, **kwargs) -> Future:
        future = Future()
        self.pool.apply_async(fn, args, kwargs, future.set_result, future.set_exception)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        (self.pool.terminate if cancel_futures else self.pool.close)()
        if wait:
            self.pool.join()


class Submitted(Executor):
    """submitit's jobs as futures; a thread waits for each.

    Args:
        submit: A `submitit.Executor`.
    """

    def __init__(self, submit: Any):
        self.submitit = submit
        self.jobs: list[Any] = []

    def submit(self, fn, /, *args, **kwargs) -> Future:
        job, future = self.submitit.submit(fn, *args, **kwargs), Future()
        self.jobs.append(job)
        future.set_running_or_notify_cancel()  # a job is cancelled by shutdown alone

        def wait() -> None:
            try:
                future.set_result(job.result())
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=wait, daemon=True).start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        for job in self.jobs:
            if cancel_futures and not job.done():
                job.cancel()


@contextmanager
def opened(name: str, workers: int, folder: Path) -> Iterator[Executor]:
    """The executor of this name, with so many workers. If the block raises, running work is stopped.

    Args:
        folder: For the files of submitit's jobs.

    Raises:
        ValueError: if there is no such executor, its package is not installed, or it cannot be opened.
    """
    place, _, words = name.partition(":")
    if place in MAKERS:
        options = _options(name, words)
        try:
            executor, close = MAKERS[place](workers, folder, **options)
        except Exception as error:
            if str(error).startswith("`--executor"):
                raise
            raise ValueError(f"`--executor` {name!r} cannot be opened: {' '.join(str(error).split())}.") from None
    else:
        executor, close = _from_function(name)
    try:
        yield executor
    except BaseException:
        close(True)
        raise
    close(False)


Made = tuple[Executor, Callable[[bool], None]]
"""The executor, and what closes it: at once, or when all is done."""


def _processes(workers: int, folder: Path) -> Made:
    threads = max(1, (os.cpu_count() or 1) // workers)
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads of torch in any state
    executor = ProcessPoolExecutor(workers, context, _start, (threads,))

    def close(at_once: bool) -> None:
        executor.shutdown(wait=not at_once, cancel_futures=at_once)
        processes = multiprocessing.active_children() if at_once else []
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()

    return executor, close


def _start(threads: int) -> None:
    """Prepares a worker: it uses its share of the cores, and ends when the process that started it ends."""
    torch.set_num_threads(threads)

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _dask(workers: int, folder: Path, address: str | None = None) -> Made:
    distributed = _package("distributed", "dask")
    cluster = {"address": address} if address else {"n_workers": workers, "threads_per_worker": 1}
    client = distributed.Client(**cluster)
    executor = client.get_executor(pure=False)

    def close(at_once: bool) -> None:
        executor.shutdown(wait=not at_once)
        client.close()

    return executor, close


def _slurm(workers: int, folder: Path, cluster: str = "slurm", **parameters: Any) -> Made:
    submit = _package("submitit", "slurm").AutoExecutor(folder / "jobs", cluster=cluster)
    submit.update_parameters(**parameters)
    executor = Submitted(submit)
    return executor, lambda at_once: executor.shutdown(cancel_futures=at_once)


MAKERS: dict[str, Callable[..., Made]] = {"processes": _processes, "dask": _dask, "slurm": _slurm}


def _package(name: str, extra: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise ValueError(
            f"`--executor {extra}` needs the package {name}, which is not installed; in the clone, pip install "
            f'-e ".[{extra}]".'
        ) from None


def _options(name: str, words: str) -> dict[str, Any]:
    """ "a=1,b=c" as {"a": 1, "b": "c"}"""
    options = dict(word.partition("=")[::2] for word in words.split(",") if word)
    if not all(key.isidentifier() and value for key, value in options.items()):
        raise ValueError(f"`--executor` must be a name, or name:key=value,key=value, got {name!r}.")
    return {key: int(value) if value.isdigit() else value for key, value in options.items()}


def _from_function(name: str) -> Made:
    module, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())  # where a user's module is
    try:
        made = getattr(import_module(module), function)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"`--executor` must be one of {', '.join(MAKERS)}, or <module>:<function> that returns an Executor, got "
            f"{name!r}: {error}."
        ) from None
    if isinstance(made, Executor):
        return made, lambda at_once: made.shutdown(wait=not at_once)
    if not hasattr(made, "apply_async"):
        raise ValueError(f"`--executor` {name!r} must return an Executor or a pool with `apply_async`, got {made!r}.")
    pool = Pool(made)
    return pool, lambda at_once: pool.shutdown(cancel_futures=at_once)
