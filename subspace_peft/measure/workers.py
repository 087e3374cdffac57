"""Those who make the runs of a search: an executor, or this process."""

from __future__ import annotations

import pickle
import time
import uuid
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait

from .search_file import Proposal
from .table import check_integer


class Workers:
    """Make as many runs at a time as there are workers.

    Attributes:
        number: How many runs are made at a time.

    Raises:
        ValueError: if there is no such executor, it does not say how many workers it has and `number` is None, or
            `train` cannot be sent to its processes.
    """

    def __init__(self, train: Callable[[int, int], float], executor: Executor | None, number: int | None):
        if not callable(train):
            raise ValueError(f"`train` must be a function of d and seed that returns a metric, got {train!r}.")
        if executor is None and number is not None:
            raise ValueError(
                f"`workers` must come with an `executor`, got workers={number!r} alone; give one, such as "
                f"concurrent.futures.ProcessPoolExecutor({number!r}), or leave `workers` out."
            )
        if not isinstance(executor, Executor | None):
            raise ValueError(
                f"`executor` must be a concurrent.futures.Executor, got {executor!r}; give one, such as "
                "concurrent.futures.ProcessPoolExecutor(4)."
            )
        self._train, self._executor = train, _ThisProcess() if executor is None else executor
        self.number = check_integer("workers", _number(self._executor) if number is None else number)
        if isinstance(executor, ProcessPoolExecutor):
            _check_picklable(train)
        self._under_way: dict[Future, Proposal] = {}

    @property
    def under_way(self) -> list[Proposal]:
        return list(self._under_way.values())

    def submit(self, proposal: Proposal) -> None:
        try:
            future = self._executor.submit(_make, self._train, *proposal, uuid.uuid4().hex)
        except Exception as error:  # the executor is broken or shut down; the run failed like one that raised
            future = Future()
            future.set_exception(error)
        self._under_way[future] = proposal

    def wait(self) -> list[tuple[Proposal, tuple[float, float] | Exception]]:
        """Wait until a run ends; all that have ended, by seed, with the metric and the seconds, or what was raised."""
        ended = wait(self._under_way, return_when=FIRST_COMPLETED).done
        outcomes = [(self._under_way.pop(future), _outcome(future)) for future in ended]
        return sorted(outcomes, key=lambda outcome: outcome[0].seed)

    def cancel(self, interrupted: bool = False) -> None:
        """Cancel the runs that have not started.

        Pools of threads and processes know which have. The futures of others, such as dask's, can be cancelled while
        their run goes on, which would lose it: they are only cancelled if the search was interrupted.
        """
        if not isinstance(self._executor, ThreadPoolExecutor | ProcessPoolExecutor) and not interrupted:
            return
        for future in list(self._under_way):
            if future.cancel():
                del self._under_way[future]


class _ThisProcess(Executor):
    """Make each run at once."""

    _max_workers = 1

    def submit(self, function: Callable, /, *arguments) -> Future:
        future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


def _make(train: Callable[[int, int], float], d: int, seed: int, attempt: str) -> tuple[float, float]:
    """The metric and the seconds of a run. The worker converts the metric, which may lie on its GPU.

    `attempt` makes the arguments unique, because dask answers a repeated call with the earlier outcome, or error.
    """
    start = time.perf_counter()
    metric = float(train(d, seed))
    return metric, round(time.perf_counter() - start, 3)


def _outcome(future: Future) -> tuple[float, float] | Exception:
    try:
        return future.result()
    except Exception as error:
        return error


def _number(executor: Executor) -> int:
    """How many workers an executor has, where that is known: pools of processes or threads, and dask's executor."""
    number = getattr(executor, "_max_workers", None)
    client = getattr(executor, "_client", None)  # dask.distributed
    if number is None and hasattr(client, "nthreads"):
        number = sum(client.nthreads().values())
    if not number:
        raise ValueError(
            f"`workers` must be given where the executor does not say how many it has, got a "
            f"{type(executor).__name__}; give the number of runs to be made at a time, such as workers=4."
        )
    return number


def _check_picklable(train: Callable[[int, int], float]) -> None:
    try:
        pickle.dumps(train)
    except Exception as error:
        raise ValueError(
            f"`train` must be picklable for a ProcessPoolExecutor, got {train!r} ({error}); define it at the top "
            "level of a module, or give a ThreadPoolExecutor."
        ) from error
