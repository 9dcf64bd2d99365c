"""A board: losses of all entrants at each budget and protocol, times and bytes, and which entrant serves which need."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from harness.leaderboard.effects import Found, loss, ranks, ratio, wins_from
from harness.leaderboard.entries import Entry, Group, apart, asked, edited, grouped, scored, timed, versions
from harness.leaderboard.frame import paired

CONTROLS = ("random", "recent", "truncate", "randomkv")
PROTOCOLS = ("prompt", "after")
Key = tuple[str, float]
"""Entrant and budget; none is 0, since NaN never equals itself."""


@dataclass(frozen=True)
class Standing:
    """An entrant on one section.

    Attributes:
        entrant: its name. method: of which method. label: with its options, as recorded first.
        loss: difference of scores from full attention's, points.
        rank: place and its interval; None where no sample was answered by all.
        kept: mean share of the context's tokens, over layers and KV heads.
        kinds, suites: kind or suite of tasks -> loss.
    """

    entrant: str
    method: str
    label: str
    loss: Found
    rank: tuple[int, int, int] | None
    kept: float
    kinds: dict[str, Found]
    suites: dict[str, Found]


@dataclass(frozen=True)
class Section:
    """Scores that may be compared: one model, protocol and budget.

    Attributes:
        group: of runs. budget: 0 where nobody matched one.
        rows: of `paired`.
    """

    group: Group
    budget: float
    rows: pd.DataFrame

    @property
    def title(self) -> str:
        """In words."""
        said = self.group.conditions
        return f"Losses, {asked(said.protocol)}, {at_budget(self.budget)} ({said.model}, {said.numbers})"

    @cached_property
    def kinds(self) -> dict[str, float]:
        """Kinds of tasks, in order of first appearance -> full attention's score, points: no loss is greater."""
        return self._by("kind")

    @cached_property
    def suites(self) -> dict[str, float]:
        """The same of suites of tasks by name and length."""
        means = self._by("suite")
        return {name: means[name] for name in sorted(means, key=lambda name: (name.partition(" ")[0], len(name), name))}

    @cached_property
    def full(self) -> float:
        """Full attention's score over all tasks, points."""
        return float(self._cells["score"].mean())

    @cached_property
    def _cells(self) -> pd.DataFrame:
        """Full attention's mean score in each cell, points."""
        full = self.rows.assign(score=100 * (self.rows["score"] - self.rows["diff"]))
        full = full.drop_duplicates(["cell", "sample"])
        return full.groupby("cell", sort=False).agg({"kind": "first", "suite": "first", "score": "mean"})

    def _by(self, column: str) -> dict[str, float]:
        means = self._cells.groupby(column, sort=False)["score"].mean()
        return {str(name): float(mean) for name, mean in means.items()}

    @cached_property
    def standings(self) -> list[Standing]:
        """By rank, then by loss."""
        places = ranks(self.rows)
        found = [_standing(str(name), part, places) for name, part in self.rows.groupby("entrant", sort=False)]
        return sorted(found, key=lambda one: (one.rank or (10**6,))[0] + (-one.loss.value or 0.0) / 1e6)


def at_budget(budget: float) -> str:
    """In words; 0 where nobody matched one."""
    return f"budget {budget:.3g}" if budget else "options as given"


@dataclass(frozen=True)
class Pace:
    """Times and bytes of an entrant beside full attention's, at one length.

    Attributes:
        entrant, budget, length: which.
        entry: the run that has it, the first of several.
        kept: mean share of the context's tokens, over layers and KV heads.
        ttft, tpot, e2e, kv, reads: full attention's over the entrant's; the last one in bytes that a decode step reads.
    """

    entrant: str
    budget: float
    length: int
    entry: str
    kept: float
    ttft: Found
    tpot: Found
    e2e: Found
    kv: Found
    reads: Found


@dataclass(frozen=True)
class Clock:
    """Times that may be compared.

    Attributes:
        group: of runs.
    """

    group: Group

    @cached_property
    def rows(self) -> pd.DataFrame:
        """Of `paired`; `budget` 0 where nobody matched one."""
        rows = paired(self.group.entries)
        return rows[rows["ttft"].notna()].assign(budget=lambda frame: frame["budget"].fillna(0.0))

    @cached_property
    def paces(self) -> list[Pace]:
        """Every entrant at every length."""
        groups: Any = self.rows.groupby(["entrant", "budget", "length"], sort=False)
        return [_pace(str(name), float(budget), int(length), part) for (name, budget, length), part in groups]

    @cached_property
    def keys(self) -> set[Key]:
        """Who has times."""
        return {(pace.entrant, pace.budget) for pace in self.paces}

    def longest(self, key: Key, measure: str) -> tuple[int, Found] | None:
        """An entrant's ratio at the longest prompts that it has an interval for, or else a value."""
        found = [(pace.length, getattr(pace, measure)) for pace in self.paces if (pace.entrant, pace.budget) == key]
        known = [one for one in found if math.isfinite(one[1].value)]
        return max(known, key=lambda one: (one[1].sure, one[0]), default=None)

    def pace(self, key: Key, length: int) -> Pace:
        """An entrant's at one of its lengths."""
        return next(pace for pace in self.paces if (pace.entrant, pace.budget, pace.length) == (*key, length))

    def starts(self, key: Key, measure: str) -> str:
        """From which length on an entrant wins, in words."""
        rows = self.rows[(self.rows["entrant"] == key[0]) & (self.rows["budget"] == key[1])]
        length, sure = wins_from(rows, measure)
        return "never" if length is None else f"{length:,}" + ("" if sure else " (no interval)")


@dataclass(frozen=True)
class Board:
    """Everything that is compared.

    Attributes:
        entries: all runs.
    """

    entries: Sequence[Entry]

    @cached_property
    def scores(self) -> list[Group]:
        """Runs whose scores go together."""
        return grouped([entry for entry in self.entries if entry.run.scored], scored)

    @cached_property
    def times(self) -> list[Group]:
        """Runs whose times go together; those of the task `speed` first, whose prompts are of exact lengths."""
        found = grouped(self.entries, timed)
        return sorted(found, key=lambda group: not _is_speed(group))

    @cached_property
    def sections(self) -> list[Section]:
        """Every protocol and budget that has scores."""
        return [section for group in self.scores for section in _sections(group)]

    def judged(self, protocol: str) -> list[Section]:
        """The sections that needs are answered with: under a protocol, of the model that most is known of."""
        if not self.scores:
            return []
        model = self.scores[0].conditions._replace(protocol=protocol)
        return [section for section in self.sections if section.group.conditions == model]

    @cached_property
    def clock(self) -> Clock | None:
        """The times that needs are answered with: of most entrants that have such scores."""
        sections = [section for protocol in PROTOCOLS for section in self.judged(protocol)]
        keys = {(one.entrant, section.budget) for section in sections for one in section.standings}
        return max(self.clocks, key=lambda clock: len(keys & clock.keys), default=None)

    @cached_property
    def clocks(self) -> list[Clock]:
        """The times of each group."""
        return [Clock(group) for group in self.times]

    def notes(self) -> Iterator[str]:
        """What was not mixed, and why."""
        yield from apart(self.scores, "Scores")
        yield from apart(self.times, "Times")
        if names := edited(self.entries):
            yield f"Runs have other code of {', '.join(names)} (--redo asks again)."
        for task, digests in versions(self.entries).items():
            known = ", ".join(map(_digest, digests))
            yield f"Task `{task}` has {len(digests)} versions ({known}): each is a task of its own."


def _digest(text: str) -> str:
    return text or "not recorded"


def _is_speed(group: Group) -> bool:
    return all(task.startswith("speed") for entry in group.entries for task in entry.run.tasks)


def _sections(group: Group) -> list[Section]:
    rows = paired(group.entries)
    rows = rows[rows["diff"].notna()].assign(budget=lambda frame: frame["budget"].fillna(0.0))
    return [Section(group, float(str(budget)), part) for budget, part in rows.groupby("budget", sort=False)]


def _standing(name: str, rows: pd.DataFrame, places: dict[str, tuple[int, int, int]]) -> Standing:
    kinds, suites = (
        {str(value): loss(part) for value, part in rows.groupby(column, sort=False)} for column in ("kind", "suite")
    )
    first = rows.iloc[0]
    return Standing(name, first["method"], first["label"], loss(rows), places.get(name), _kept(rows), kinds, suites)


def _kept(rows: pd.DataFrame) -> float:
    return float(rows["kept"].mean()) if rows["kept"].notna().any() else math.nan


def _pace(entrant: str, budget: float, length: int, rows: pd.DataFrame) -> Pace:
    found = (ratio(rows, measure) for measure in ("ttft", "tpot", "e2e", "kv", "reads"))
    return Pace(entrant, budget, length, str(rows["entry"].iloc[0]), _kept(rows), *found)
