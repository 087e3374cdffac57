"""`d: auto`: the smallest d that reaches a threshold, looked for by runs that each have a result of their own."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes import environment, sharing
from recipes.grid import Search
from recipes.results import Results
from recipes.settings import Settings
from recipes.summary import markdown
from subspace_peft.measure import Search as DimensionSearch
from subspace_peft.measure import find_dimension


if TYPE_CHECKING:
    from recipes.run import Sweep


def carry_out(searches: list[Search], sweep: "Sweep", output: Path) -> None:
    """Every search that has no outcome and that no other process holds."""

    def do(search: Search) -> None:
        goal = threshold(search, sweep)
        found = look_for(search, goal, sweep)
        if sweep.accelerator.is_main_process:
            outcomes.write(search, outcome(search, goal, found, sweep.results) | environment.record())

    outcomes = Results(output / "searches") if searches else None
    sharing.carry_out(searches, outcomes, do, state=sweep.accelerator)


def look_for(search: Search, goal: float, sweep: "Sweep") -> DimensionSearch:
    """By the runs that it needs; those that have a result are not made again."""
    return find_dimension(lambda d, seed: sweep.accuracy(search.run(d, seed)), goal, progress=False, **search.options)


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
    task = search.settings.dataset, search.settings.model
    full = [run for run in sweep.asked if run.projection == "full" and (run.dataset, run.model) == task]
    if len({replace(run, seed=0) for run in full}) > 1:
        raise ValueError(
            f"`fraction` of `d: auto` needs full trainings of {search.settings.model} that differ in seed alone, got "
            f"{len({replace(run, seed=0) for run in full})} kinds; leave one, or give `threshold`."
        )
    if not full:
        raise ValueError(
            f"`fraction` of `d: auto` needs full training of {search.settings.model} on {search.settings.dataset} in "
            "the same recipe; add {projection: full}, or give `threshold`."
        )
    return search.fraction * sum(map(sweep.accuracy, full)) / len(full)


def made(searches: list[Search], output: Path) -> list[Settings]:
    """The runs that the searches made."""
    outcomes = Results(output / "searches") if searches else None
    return [search.run(*point) for search in searches for point in outcomes.load(search).get("made", ())]


def pending(searches: list[Search], output: Path) -> int:
    """How many have no outcome yet."""
    return sum(not Results(output / "searches").has(search) for search in searches)


def text(searches: list[Search], output: Path) -> str:
    """The outcomes as Markdown."""
    rows, said = [], []
    for search in searches:
        if found := Results(output / "searches").load(search):
            settings, above = search.settings, f"above {search.options['d_max']}"
            low, high = (above if end is None else end for end in found["interval"])
            said.append(found["text"])
            rows.append(
                [settings.dataset, settings.model, settings.projection, f"{100 * found['goal']:.2f}"]
                + [found["d"] or "none", low if low == high else f"{low} to {high}"]
                + [len(found["made"]), f"{found['seconds']:.0f}"]
            )
    header = ["dataset", "model", "projection", "threshold %", "d", "95 % interval", "runs", "s of training"]
    return "\n".join([*markdown(header, rows), "", *said])
