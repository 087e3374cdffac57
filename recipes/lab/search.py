"""Carrying out `d: auto`: a search for the smallest d that reaches a threshold, each of its runs with a result."""

import time
from concurrent.futures import Executor
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

from tqdm import tqdm

from recipes.lab import environment
from recipes.lab.kinds import Kind, find_kind
from recipes.lab.request import SearchRequest
from recipes.lab.results import Results
from recipes.lab.settings import Run
from recipes.lab.sweep import WAIT, Sweep, decided, processes
from subspace_peft.measure import SearchResult, find_dimension


DEFAULTS = {name: parameter.default for name, parameter in signature(find_dimension).parameters.items()}
BAR = "{desc}{n_fmt} of at most {total_fmt} runs [{elapsed}, at most {remaining} left, {rate_inv_fmt}{postfix}]"
"""The bar of all searches of a recipe. How many runs one needs shows as they come; `max_runs` is the most."""


def carry_out(
    searches: list[SearchRequest], kind: Kind, output: Path, executor: Executor | None = None, workers: int = 1
) -> None:
    """Carry out every search that has no outcome and that no other process holds, with this many workers."""
    results, main = Results(output), processes().is_main_process
    if not decided(lambda: any(not results.has(search) for search in searches)):
        return
    with tqdm(unit="run", smoothing=0, bar_format=BAR, disable=not main) as bar:
        for at, search in enumerate(searches):
            if not decided(lambda search=search: not results.has(search) and results.take(search)):
                continue
            try:
                following = [other for other in searches[at:] if not results.has(other)]
                bar.total = bar.n + sum(option(other, "max_runs") for other in following)
                goal = threshold(search, kind, output)
                result = look_for(search, goal, kind, output, bar, executor, workers)
                if main:
                    results.write(search, outcome(search, goal, result, kind, results) | environment.record())
                    _notes(search, output).unlink(missing_ok=True)
            finally:
                if main:
                    results.release(search)
        bar.total = bar.n


def look_for(
    search: SearchRequest,
    goal: float,
    kind: Kind,
    output: Path,
    bar: tqdm,
    executor: Executor | None = None,
    workers: int = 1,
) -> SearchResult:
    """Search for the smallest d; a run that has a result is not made again."""
    if executor is not None:
        train = partial(accuracy_at, kind.name, search, output)
        notes = _notes(search, output)
        result = find_dimension(train, goal, executor=executor, workers=workers, file=notes, **search.options)
        bar.update(result.cost.runs)
        return result
    tried = []

    def train(d: int, seed: int) -> float:
        run = search.run(d, seed)
        bar.set_description(f"{run.dataset} {run.model} {run.projection}, d = {d}")
        there = Results(output).has(run)
        reached = accuracy(run, kind, output)
        tried.append((d, reached))
        bar.set_postfix_str(bracket(tried, goal), refresh=False)
        if there and not bar.disable:
            bar.initial += 1  # it took no time, and what is left is told by the time of those made now
        bar.update()
        return reached

    return find_dimension(train, goal, progress=False, **search.options)


def _notes(search: SearchRequest, output: Path) -> Path:
    """Which runs a search has proposed, so that a restart makes the same."""
    return output / "results" / f"{search.name}.search"


def accuracy_at(kind: str, search: SearchRequest, output: Path, d: int, seed: int) -> float:
    """`accuracy` with arguments that can be pickled."""
    return accuracy(search.run(d, seed), find_kind(kind), output)


def accuracy(run: Run, kind: Kind, output: Path) -> float:
    """The final test accuracy of a run, which is made unless it has a result; another process may be at it."""
    results = Results(output)
    while not decided(lambda: results.has(run)):
        Sweep(kind, [run], output).carry_out(progress=False)
        if not results.has(run):
            time.sleep(WAIT)
    return decided(lambda: kind.accuracy(results.load(run)))


def bracket(tried: list[tuple[int, float]], goal: float) -> str:
    """Where runs reached the goal and where they did not; by chance the two may overlap."""
    reached, missed = ([d for d, accuracy in tried if (accuracy >= goal) == right] for right in (True, False))
    words = [f"reached from d = {min(reached)}"] if reached else []
    words += [f"missed up to d = {max(missed)}"] if missed else []
    return ", ".join(words)


def option(search: SearchRequest, key: str) -> Any:
    return search.options.get(key, DEFAULTS[key])


def outcome(search: SearchRequest, goal: float, result: SearchResult, kind: Kind, results: Results) -> dict[str, Any]:
    made = [(int(d), int(seed)) for d, seed in result.runs[["d", "seed"]].to_numpy()]
    seconds = sum(kind.seconds(results.load(search.run(d, seed))) for d, seed in made)
    return {
        "goal": goal,
        "d": result.d,
        "interval": result.interval,
        "made": made,
        "seconds": round(seconds, 1),
        "text": str(result),
    }


def threshold(search: SearchRequest, kind: Kind, output: Path) -> float:
    if search.threshold is not None:
        return search.threshold
    return search.fraction * sum(accuracy(run, kind, output) for run in search.full) / len(search.full)


def made(searches: list[SearchRequest], results: Results) -> list[Run]:
    """The runs that the searches made."""
    return [search.run(*point) for search in searches for point in results.load(search).get("made", ())]
