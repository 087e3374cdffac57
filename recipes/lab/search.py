"""`d: auto`: the smallest d that reaches a threshold, looked for by runs that each have a result of their own."""

from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from tqdm import tqdm

from recipes.lab import environment, sharing
from recipes.lab.grid import SEARCH, Search
from recipes.lab.results import Results
from recipes.reports.dimension import SETTINGS, apart, markdown
from recipes.training.settings import Settings
from subspace_peft.measure import Search as DimensionSearch
from subspace_peft.measure import find_dimension


if TYPE_CHECKING:
    from recipes.run import Sweep


DEFAULTS = {name: parameter.default for name, parameter in signature(find_dimension).parameters.items()}
OPTIONS = [key for key in SEARCH if key not in ("threshold", "fraction")]
BAR = "{desc}{n_fmt} of at most {total_fmt} runs [{elapsed}, at most {remaining} left, {rate_inv_fmt}{postfix}]"
"""Of all searches of a recipe. How many runs one needs shows as they come; `max_runs` is the most."""


def carry_out(searches: list[Search], sweep: "Sweep", output: Path) -> None:
    """Every search that has no outcome and that no other process holds."""
    if not searches:
        return
    outcomes, main = Results(output / "searches"), sweep.accelerator.is_main_process

    def do(search: Search) -> None:
        following = [other for other in searches[searches.index(search) :] if not outcomes.has(other)]
        bar.total = bar.n + sum(option(other, "max_runs") for other in following)
        goal = threshold(search, sweep)
        found = look_for(search, goal, sweep, bar)
        if main:
            outcomes.write(search, outcome(search, goal, found, sweep.results) | environment.record())

    with tqdm(unit="run", smoothing=0, bar_format=BAR, disable=not main) as bar:
        sharing.carry_out(searches, outcomes, do, state=sweep.accelerator)
        bar.total = bar.n


def look_for(search: Search, goal: float, sweep: "Sweep", bar: tqdm) -> DimensionSearch:
    """By the runs that it needs; those that have a result are not made again."""
    tried = []

    def train(d: int, seed: int) -> float:
        run = search.run(d, seed)
        bar.set_description(f"{run.dataset} {run.model} {run.projection}, d = {d}")
        there = sweep.results.has(run)
        accuracy = sweep.accuracy(run)
        tried.append((d, accuracy))
        bar.set_postfix_str(bracket(tried, goal), refresh=False)
        if there and not bar.disable:
            bar.initial += 1  # it took no time, and what is left is told by the time of those made now
        bar.update()
        return accuracy

    return find_dimension(train, goal, progress=False, **search.options)


def bracket(tried: list[tuple[int, float]], goal: float) -> str:
    """Where runs reached the goal and where they did not; by chance the two may overlap."""
    reached, missed = ([d for d, accuracy in tried if (accuracy >= goal) == right] for right in (True, False))
    words = [f"reached from d = {min(reached)}"] if reached else []
    words += [f"missed up to d = {max(missed)}"] if missed else []
    return ", ".join(words)


def option(search: Search, key: str) -> Any:
    return search.options.get(key, DEFAULTS[key])


def outcome(search: Search, goal: float, found: DimensionSearch, results: Results) -> dict[str, Any]:
    made = [(int(d), int(seed)) for d, seed in found.runs[["d", "seed"]].to_numpy()]
    seconds = sum(results.load(search.run(d, seed))["seconds"]["train"] for d, seed in made)
    return {
        "goal": goal,
        "d": found.d,
        "interval": found.interval,
        "made": made,
        "seconds": round(seconds, 1),
        "text": str(found),
    }


def threshold(search: Search, sweep: "Sweep") -> float:
    if search.threshold is not None:
        return search.threshold
    return search.fraction * sum(map(sweep.accuracy, search.full)) / len(search.full)


def made(searches: list[Search], output: Path) -> list[Settings]:
    """The runs that the searches made."""
    outcomes = Results(output / "searches") if searches else None
    return [search.run(*point) for search in searches for point in outcomes.load(search).get("made", ())]


def pending(searches: list[Search], output: Path) -> int:
    """How many have no outcome yet."""
    return sum(not Results(output / "searches").has(search) for search in searches)


def text(searches: list[Search], output: Path) -> str:
    """The outcomes as Markdown."""
    results = Results(output / "searches")
    found = [(search, outcome) for search in searches if (outcome := results.load(search))]
    rows = []
    for (search, outcome), projection in zip(found, projections([search for search, _ in found]), strict=True):
        settings, above = search.settings, f"above {search.options['d_max']}"
        low, high = (above if end is None else end for end in outcome["interval"])
        rows.append(
            [settings.dataset, settings.model, projection, f"{100 * outcome['goal']:.2f}"]
            + [outcome["d"] or "none", low if low == high else f"{low} to {high}"]
            + [len(outcome["made"]), f"{outcome['seconds']:.0f}"]
        )
    header = ["dataset", "model", "projection", "threshold %", "d", "95 % interval", "runs", "s of training"]
    return "\n".join([*markdown(header, rows), "", *(outcome["text"] for _, outcome in found)])


def projections(searches: list[Search]) -> list[str]:
    """Of each search, made longer by the settings and options in which searches of it differ."""
    if not searches:
        return []
    options = [{key: option(search, key) for key in OPTIONS} for search in searches]
    rows = [search.settings.record() | own for search, own in zip(searches, options, strict=True)]
    return apart(pd.DataFrame(rows), [*SETTINGS, *OPTIONS]).sort_index().projection.tolist()
