"""Which method for which need, at what loss, and how sure that is.

Among entrants that win what the need asks for, those come first whose loss is shown to stay within the margin, then
those whose loss was within it but may be larger, then those that lost more but perhaps by chance; in each the one that
wins most. Nobody serves a need whose protocol no run has, unless no run has scores at all; controls never do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from harness.leaderboard.board import CONTROLS, Board, Clock, Key, Section
from harness.leaderboard.effects import Found

SHOWN = 3
"""Entrants a need."""

Standing = Literal["shown", "open", "doubtful", "unknown", "loses"]
_ORDER: tuple[Standing, ...] = ("shown", "open", "doubtful", "unknown", "loses")


@dataclass(frozen=True)
class Need:
    """What somebody wants.

    Attributes:
        title: in words.
        measure: what is to be won.
        protocol: under which the loss counts.
        won: what the ratio is of, in words.
    """

    title: str
    measure: str
    protocol: str
    won: str


NEEDS = (
    Need("A short time to first token", "ttft", "prompt", "TTFT"),
    Need("Little memory for keys and values", "kv", "prompt", "KV bytes"),
    Need("Long answers", "tpot", "prompt", "time a token"),
    Need("Several questions about one text", "kv", "after", "KV bytes"),
)


@dataclass(frozen=True)
class Answer:
    """An entrant for a need.

    Attributes:
        need: which.
        entrant, budget: who.
        gain: full attention's time or bytes over the entrant's, at `length`.
        loss: difference of scores in points; None where none is recorded.
        standing: what is known of the loss.
        starts: from which length on it wins, in words.
    """

    need: Need
    entrant: str
    budget: float
    gain: Found
    length: int
    loss: Found | None
    standing: Standing
    starts: str

    def sureness(self, points: float) -> str:
        """How sure the loss is, in words."""
        if self.standing == "unknown" or self.loss is None:
            return "loss not recorded"
        if self.standing == "shown":
            return f"loses less than {points:g} points (95 %)"
        if self.standing == "loses":
            return f"lost more than {points:g} points"
        if not self.loss.sure:
            return f"undecided: {self.loss.samples} samples are too few"
        return f"undecided: may lose {max(0.0, -self.loss.low):.1f} points"


def answers(board: Board, points: float) -> list[Answer]:
    """The best few entrants for every need, best first.

    Args:
        board: the runs.
        points: loss that is still acceptable.
    """
    if (clock := board.clock) is None:
        return []
    return [answer for need in NEEDS for answer in _of_need(board, clock, need, points)]


def _of_need(board: Board, clock: Clock, need: Need, points: float) -> list[Answer]:
    losses = _losses(board, need.protocol)
    keys = sorted(clock.keys & losses.keys()) if board.sections else sorted(clock.keys)
    found = [one for key in keys for one in _answer(clock, need, key, losses.get(key), points)]
    ordered = sorted(found, key=_place)
    return [one for one in ordered if one.standing != "loses"][:SHOWN] or ordered[:1]


def _place(one: Answer) -> tuple[int, float, float]:
    """Bytes of methods at one budget are equal but for rounding: then the loss decides."""
    return _ORDER.index(one.standing), -round(one.gain.value, 1), -one.loss.value if one.loss else 0.0


def _losses(board: Board, protocol: str) -> dict[Key, Found]:
    """Of the first model that has scores under the protocol."""
    own = [section for section in board.sections if section.group.conditions.protocol == protocol]
    model = own[0].group if own else None
    return {key: loss for section in own if section.group is model for key, loss in _of_section(section)}


def _of_section(section: Section) -> Iterator[tuple[Key, Found]]:
    for one in section.standings:
        yield (one.entrant, section.budget), one.loss


def _answer(clock: Clock, need: Need, key: Key, loss: Found | None, points: float) -> Iterator[Answer]:
    found = clock.longest(key, need.measure)
    if found is None or key[0].partition(":")[0] in CONTROLS:
        return
    length, gain = found
    if (gain.low if gain.sure else gain.value) > 1:
        yield Answer(need, *key, gain, length, loss, standing(loss, points), clock.starts(key, need.measure))


def standing(loss: Found | None, points: float) -> Standing:
    """What is known of a loss against a margin of so many points."""
    if loss is None or math.isnan(loss.value):
        return "unknown"
    if loss.sure and loss.low >= -points:
        return "shown"
    if loss.value >= -points:
        return "open"
    return "doubtful" if loss.sure and loss.high >= -points else "loses"
