"""Sweep: every run of a recipe once, by any number of workers and commands that share its output folder."""

import itertools
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from recipes.lab import environment
from recipes.lab.command import is_refusal
from recipes.lab.executors import Here
from recipes.lab.kinds import Kind, Report, find_kind
from recipes.lab.results import Results
from recipes.lab.settings import Run


WAIT = 2.0
"""Seconds between looks at what other processes do."""
PASSES = 5
"""How often a free run may come back unmade, because other commands held it for a moment."""


def silent(accuracy: float) -> None:
    pass


def processes() -> PartialState:
    """The processes of one `accelerate launch`, which make each run together."""
    return PartialState(cpu=not torch.accelerator.is_available())


def decided(decide: Callable[[], Any]) -> Any:
    """Return the main process's decision on every process."""
    state = processes()
    if state.num_processes == 1:
        return decide()
    return broadcast_object_list([decide() if state.is_main_process else None])[0]


def make(kind: str, group: list[Run], output: Path, report: Report = silent) -> list[str] | Exception:
    """Make the runs of a group that are still wanted and that nobody else holds. Runs in any process.

    Returns:
        Their names; their results are in the output folder. If our code refused a value, the error: not every executor
        brings an exception back as it was.
    """
    kind, results, main = find_kind(kind), Results(output), processes().is_main_process
    taken = decided(lambda: [run.name for run in group if _take(kind, run, results)])
    runs = [run for run in group if run.name in taken]
    try:
        for run, result in zip(runs, kind.make(runs, output, report) if runs else [], strict=True):
            if main and not results.has(run):
                results.write(run, result | environment.record())
    except Exception as error:
        if not is_refusal(error):
            raise
        error.refusal = True
        return error
    finally:
        for run in runs if main else ():
            results.release(run)
    return taken


def _take(kind: Kind, run: Run, results: Results) -> bool:
    """Whether the run is now with this process, and is to be made: it may have been finished a moment ago."""

    def wanted() -> bool:
        return not results.has(run) or kind.incomplete(run, results.output)

    if not wanted() or not results.take(run):
        return False
    if not wanted():
        results.release(run)
        return False
    return True


class Sweep:
    """The runs of a recipe, and those before them whose trajectories they need."""

    def __init__(self, kind: Kind, runs: list[Run], output: Path):
        self.kind, self.output, self.results = kind, output, Results(output)
        self.followers: dict[str, list[Run]] = {}  # by the name of the run that they need
        self.passed_over: dict[str, int] = {}  # how often a free run came back unmade, by its name
        before = {}
        for run in runs:
            for needed in kind.before(run):
                before[needed.name] = needed
                self.followers.setdefault(needed.name, []).append(run)
        self.runs = list((before | {run.name: run for run in runs}).values())

    def wanted(self, run: Run) -> bool:
        """Whether it has no result, or a file that it should leave is missing or needed by another run."""
        if not self.results.has(run) or self.kind.incomplete(run, self.output):
            return True
        return any(
            not self.results.has(other) and not self.kind.ready(other, run, self.output)
            for other in self.followers.get(run.name, ())
        )

    def all_wanted(self) -> list[Run]:
        return [run for run in self.runs if self.wanted(run)]

    def carry_out(self, executor: Executor | None = None, workers: int = 1, progress: bool = True) -> None:
        """Makes every run that is wanted and that no other process holds, so many at a time.

        Waits for a trajectory that another command records; leaves its other runs to it.

        Raises:
            ValueError: if a run refuses a value, or the workers do not see the output folder.
        """
        bar = self._bar(progress)
        report = silent if executor else lambda accuracy: _show(bar, accuracy)
        place, under_way = executor or Here(), {}
        with bar:
            try:
                while True:
                    group = decided(lambda: self._next(under_way)) if len(under_way) < workers else None
                    if group:
                        self._describe(bar, group)
                        arguments = self.kind.name, group, self.output
                        future = place.submit(make, *arguments, *([] if executor else [report]))
                        under_way[future] = group
                    elif under_way:
                        self._collect(under_way, bar)
                    elif not decided(lambda: [run for run in self.all_wanted() if not self._is_ready(run)]):
                        return
                    else:
                        time.sleep(WAIT)
            except BaseException:
                for future in under_way:
                    future.cancel()
                raise

    def _next(self, under_way: dict[Future, list[Run]]) -> list[Run]:
        """A run that is free, and others that can be made at once with it."""
        busy = {run.name for group in under_way.values() for run in group}
        free = (
            run for run in self.runs
            if run.name not in busy and self.wanted(run) and self._is_ready(run) and not self.results.held(run)
        )  # fmt: skip
        first = next(free, None)
        if first is None:
            return []
        shared = self.kind.alike(first)
        company = (run for run in free if shared is not None and self.kind.alike(run) == shared)
        group = [first, *itertools.islice(company, max(0, getattr(first, "together", 0) - 1))]
        return [self.kind.kept(run) if run.name in self.followers else run for run in group]

    def _is_ready(self, run: Run) -> bool:
        return all(self.kind.ready(run, needed, self.output) for needed in self.kind.before(run))

    def _collect(self, under_way: dict[Future, list[Run]], bar: tqdm) -> None:
        """Waits for runs to end, and raises what one of them raised."""
        for future in wait(under_way, WAIT, FIRST_COMPLETED).done:
            group, made = under_way.pop(future), future.result()
            if isinstance(made, Exception):
                made.refusal = True
                raise made
            for run in group:
                if run.name in made:
                    self._check(run)
                elif self.wanted(run) and not self.results.held(run):
                    self._check_seen(run)
        if not bar.disable:
            bar.n = self._done()
            bar.refresh()

    def _check(self, run: Run) -> None:
        """A run that was just made: its result must be here, and what it left must suffice for others."""
        if processes().num_processes == 1 and not self.results.has(run):  # of several, the main one may still write
            raise self._unseen(run)
        for other in self.followers.get(run.name, ()):
            self.kind.check_left(run, other, self.output)

    def _check_seen(self, run: Run) -> None:
        """A run that nobody made: another command may have held it for a moment, but not time and again."""
        self.passed_over[run.name] = self.passed_over.get(run.name, 0) + 1
        if self.passed_over[run.name] > PASSES:
            raise self._unseen(run)

    def _unseen(self, run: Run) -> ValueError:
        return ValueError(
            f"The workers must see the output folder {str(self.output)!r}, where {run} left no result; give an "
            "`--output` that is the same folder for all of them."
        )

    def _bar(self, progress: bool) -> tqdm:
        total = sum(map(_size, self.runs))
        look = {"unit": "epoch", "smoothing": 0, "mininterval": 1, "leave": progress}
        quiet = not processes().is_main_process
        return tqdm(total=total, initial=self._done(), disable=quiet, **look)

    def _done(self) -> int:
        """Epochs, by all processes."""
        return sum(_size(run) for run in self.runs if not self.wanted(run))

    def _describe(self, bar: tqdm, group: list[Run]) -> None:
        if not bar.disable:
            bar.n = self._done()
        bar.set_description(f"{group[0]}" + (f" and {len(group) - 1} like it" if group[1:] else ""), refresh=False)
        bar.set_postfix()


def _size(run: Run) -> int:
    return getattr(run, "epochs", 1)


def _show(bar: tqdm, accuracy: float) -> None:
    bar.set_postfix(accuracy=f"{100 * accuracy:.2f}", refresh=False)
    bar.update()
