"""The runs of a search, in memory and in its file."""

from __future__ import annotations

import bisect
import math
from collections.abc import Collection
from pathlib import Path

import pandas as pd

from .probability import reached
from .schedule import Schedule
from .search_file import Proposal, Run, SearchFile


class RunError(RuntimeError):
    """A run of a search raised, or returned no number.

    Attributes:
        d, seed: Of that run.
        runs: The finished runs, as in `SearchResult`.
    """

    def __init__(self, message: str, d: int, seed: int, runs: pd.DataFrame):
        super().__init__(message)
        self.d, self.seed, self.runs = d, seed, runs

    def __reduce__(self) -> tuple:  # a process that makes a whole search returns it
        return type(self), (str(self), self.d, self.seed, self.runs)


class Trials:
    """Finished runs, by seed, and proposals that have not become runs.

    Args:
        file: Where they are kept and taken up again; None: in memory alone.
        search: The settings of the search, which the file must have too.
        in_turn: Whether each run ends before the next is proposed; the file then needs no proposals.
    """

    def __init__(self, threshold: float, larger_is_better: bool, file: Path | None, search: dict, in_turn: bool):
        self.threshold, self.larger_is_better, self.in_turn = threshold, larger_is_better, in_turn
        self.file = SearchFile(file, search) if file else None
        self.runs: list[Run] = []
        self.proposals: dict[int, Proposal] = {}
        if self.file:
            self.proposals = {line["seed"]: Proposal(**line) for line in self.file.proposals}
            for line in self.file.runs:
                self._add(Proposal(line["d"], line["seed"]), line["metric"], line["seconds"])

    def propose(self, schedule: Schedule, under_way: Collection[Proposal]) -> Proposal | None:
        """The run to make beside those under way: an earlier proposal that did not end, or a new one."""
        d = schedule.propose(self.runs, under_way)
        if d is None:
            return None
        unmade = [proposal for proposal in self.proposals.values() if proposal not in under_way]
        if unmade:
            return min(unmade, key=lambda proposal: proposal.seed)
        proposal = Proposal(d, len(self.runs) + len(self.proposals))
        self.proposals[proposal.seed] = proposal
        if self.file and not self.in_turn:
            self.file.add_proposal(proposal)
        return proposal

    def add(self, proposal: Proposal, metric: float, seconds: float) -> None:
        run = self._add(proposal, metric, seconds)
        if self.file:
            self.file.add_run(run)

    def table(self) -> pd.DataFrame:
        return pd.DataFrame(self.runs, columns=Run._fields)

    def failed(self, proposal: Proposal, error: Exception) -> RunError:
        where = "`runs` of this error; with `file`, the same call could go on"
        if self.file:
            where = f"{str(self.file.path)!r}, with which the same call goes on"
        message = (
            f"The run of d = {proposal.d}, seed = {proposal.seed} failed: {type(error).__name__}: "
            f"{str(error).removesuffix('.')}. "
            f"The {len(self.runs)} finished runs are kept in {where}."
        )
        return RunError(message, *proposal, self.table())

    def _add(self, proposal: Proposal, metric: float, seconds: float) -> Run:
        metric = metric if math.isfinite(metric) else math.nan
        success = bool(reached(metric, self.threshold, self.larger_is_better))
        run = Run(*proposal, metric, success, seconds)
        bisect.insort(self.runs, run, key=lambda run: run.seed)
        self.proposals.pop(proposal.seed, None)
        return run
