"""The loop of every sweep: each process takes the next run that is wanted and that no other holds."""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list


State = Accelerator | PartialState | None
"""Of the processes that do each run together; None: there is one."""


class Held(Protocol):
    """Results, with a lock for each run."""

    def has(self, run: Any) -> bool: ...
    def take(self, run: Any) -> bool: ...
    def release(self, run: Any) -> None: ...


def carry_out(
    runs: Iterable[Any],
    results: Held,
    do: Callable[[Any], None],
    wanted: Callable[[Any], bool] | None = None,
    state: State = None,
) -> int:
    """Does every run that is wanted and free; how many these were. Wanted are, unless said, those without a result."""
    wanted = wanted or (lambda run: not results.has(run))
    done = 0
    for run in runs:
        if decided(lambda run=run: take(run, results, wanted), state):
            try:
                do(run)
                done += 1
            finally:
                if is_main(state):
                    results.release(run)
    return done


def take(run: Any, results: Held, wanted: Callable[[Any], bool]) -> bool:
    """Whether the run is now with this process, and is to be done: it may have been finished a moment ago."""
    if not wanted(run) or not results.take(run):
        return False
    still = wanted(run)
    if not still:
        results.release(run)
    return still


def decided(decide: Callable[[], Any], state: State) -> Any:
    """What the main process decides, on every process."""
    if state is None:
        return decide()
    return broadcast_object_list([decide() if state.is_main_process else None])[0]


def is_main(state: State) -> bool:
    return state is None or state.is_main_process


@contextmanager
def helped_by(helpers: int, command: list[str]) -> Iterator[None]:
    """While so many more processes run this Python command, which are waited for.

    Raises:
        RuntimeError: if one of them failed, with the end of what it said.
    """
    with ExitStack() as stack:
        started = []
        for _ in range(helpers):
            said = stack.enter_context(tempfile.TemporaryFile())
            process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=said)
            started.append((stack.enter_context(process), said))
        try:
            yield
        except BaseException:
            for process, _ in started:
                process.terminate()
            raise
        for process, said in started:
            if process.wait():
                said.seek(0)
                raise RuntimeError(f"A helping process failed: {said.read().decode(errors='replace')[-1000:]}")
