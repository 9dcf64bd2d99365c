"""Which method for which need, at what loss, and how sure that is.

Among entrants that win what the need asks for, those come first whose loss is shown to stay within the margin, then
those whose loss was within it but may be larger, then those that lost more but perhaps by chance; of each the two that
win most, who pays no other price first, and of the less sure only who wins more than all that are surer. Of those that
lost more one is enough where others are named. What has no interval, for want of records, or one that spans half of all
losses, answers nothing: then it is said what is missing. Controls never serve a need.

Bytes are counted and need no clock: budgets that were scored but not timed count where memory is wanted, and what they
cost besides is read at the nearest budget that was timed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from harness.leaderboard.board import CONTROLS, Board, Clock, Key, Pace, Standing
from harness.leaderboard.effects import Found
from harness.leaderboard.entries import asked
from harness.statistics.estimators import FEWEST

SHOWN = 2
"""Entrants a need and word for their loss."""

WIDEST = 40.0
"""Points from end to end of an interval beyond which it says nothing of a loss, but where all of it is one."""

SLIGHT = 0.02
"""Up to which a ratio counts as neither better nor worse than full attention's: nobody chooses a method for less."""

Word = Literal["shown", "open", "doubtful", "unknown", "loses"]
_ORDER: tuple[Word, ...] = ("shown", "open", "doubtful", "unknown", "loses")


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
        kept: mean share of the context's tokens; NaN where no scores are recorded.
        gain: full attention's time or bytes over the entrant's.
        length: of prompts that the gain was read at; None for all that were scored.
        loss: difference of scores in points; None where the board has no scores at all.
        standing: what is known of the loss.
        starts: from which length on it wins, in words.
        price: what is worse than full attention's at that length: what it is, and full attention's over the entrant's.
        priced: budget at which the price was read; None where nothing of the entrant was timed.
    """

    need: Need
    entrant: str
    budget: float
    kept: float
    gain: Found
    length: int | None
    loss: Found | None
    standing: Word
    starts: str
    price: list[tuple[str, Found]]
    priced: float | None

    def sureness(self, points: float) -> str:
        """How sure the loss is, in words."""
        if self.loss is None:
            return "loss not recorded"
        if self.standing == "shown":
            return f"shown to lose less than {points:g} points (95 %)"
        if self.standing == "loses":
            return f"shown to lose more than {points:g} points (95 %)"
        if self.standing == "doubtful":
            return f"likely loses more than {points:g} points"
        return f"undecided: may lose {max(0.0, -self.loss.low):.1f} points"


def answers(board: Board, points: float, shown: int = SHOWN) -> list[Answer]:
    """The best few entrants for every need, best first.

    Args:
        board: the runs.
        points: loss that is still acceptable.
        shown: entrants a need and word for their loss.
    """
    if (clock := board.clock) is None:
        return []
    return [answer for need in NEEDS for answer in _of_need(board, clock, need, points, shown)]


def missing(board: Board, need: Need, points: float) -> str:
    """Why nobody is shown to serve a need, in words: what is not recorded yet, or that nobody wins."""
    if (clock := board.clock) is None:
        return "no times recorded"
    losses, keys = _standings(board, need.protocol), _keys(board, clock, need)
    if board.sections and not losses:
        return f"nothing scored with the {asked(need.protocol)}"
    most = max((one.loss.samples for one in losses.values()), default=0)
    if losses and not any(one.loss.sure for one in losses.values()):
        return f"losses are of {most} samples at most; {FEWEST} are the fewest for an interval"
    gains = _gains(clock, keys, need)
    if not gains:
        return f"no {need.won} of the methods whose losses are known"
    if _few(need, gains):
        pairs = max(gain.samples for gain in gains)
        return f"{need.won} is of {pairs} pairs at most, {FEWEST} are the fewest for an interval"
    return f"nobody wins; the best has {max(gain.value for gain in gains):.2f}x"


def so_far(board: Board, need: Need, points: float) -> Answer | None:
    """Who is ahead where nobody is shown to serve a need, for want of times."""
    if (clock := board.clock) is None or not _few(need, _gains(clock, _keys(board, clock, need), need)):
        return None
    return next(iter(_of_need(board, clock, need, points, shown=1, sure=False)), None)


def _gains(clock: Clock, keys: Sequence[Key], need: Need) -> list[Found]:
    return [found[1] for key in keys if (found := clock.longest(key, need.measure)) is not None]


def _few(need: Need, gains: Sequence[Found]) -> bool:
    """Whether pairs of times are too few for any interval."""
    return need.measure != "kv" and not any(gain.sure for gain in gains)


def _of_need(board: Board, clock: Clock, need: Need, points: float, shown: int, *, sure: bool = True) -> list[Answer]:
    """Best first; also those whose gain has no interval, unless it has to be sure."""
    losses = _standings(board, need.protocol)
    known = [one for key in _keys(board, clock, need) for one in _answer(clock, need, key, losses.get(key), points)]
    known += _untimed(board, clock, need, losses, points) if need.measure == "kv" else []
    found = [one for one in known if not sure or need.measure == "kv" or one.gain.low > 1]
    ordered = sorted(found, key=_place)
    chosen, most = list[Answer](), 1.0
    for standing, alike in groupby(ordered, key=lambda one: one.standing):
        if chosen and standing == "loses":
            break
        few = standing == "loses" or (chosen and standing == "doubtful")
        better = [one for one in alike if one.gain.value > most][: 1 if few else shown]
        chosen, most = chosen + better, max([most, *(one.gain.value for one in better)])
    return chosen


def _place(one: Answer) -> tuple[int, float, bool, float]:
    """Bytes of methods at one budget are equal but for rounding: then the price decides, then the loss."""
    gain, loss = round(one.gain.value, 1), one.loss.value if one.loss else 0.0
    return _ORDER.index(one.standing), -gain, bool(one.price), -loss


def _standings(board: Board, protocol: str) -> dict[Key, Standing]:
    return {(one.entrant, section.budget): one for section in board.judged(protocol) for one in section.standings}


def _keys(board: Board, clock: Clock, need: Need) -> list[Key]:
    """Whom to ask: those with times, and scores if anybody has some."""
    known = clock.keys & _standings(board, need.protocol).keys() if board.sections else clock.keys
    return sorted(key for key in known if key[0].partition(":")[0] not in CONTROLS)


def _answer(clock: Clock, need: Need, key: Key, known: Standing | None, points: float) -> Iterator[Answer]:
    found = clock.longest(key, need.measure)
    if found is None or (known is not None and not _tells(known.loss, points)):
        return
    length, gain = found
    pace = clock.pace(key, length)
    # A step that reads as much as full attention's is no faster; a card that had less to do before it may be.
    if need.measure == "tpot" and pace.reads.value < 1 + SLIGHT:
        return
    if gain.value > 1 + SLIGHT and not gain.low <= 1:
        kept, loss = (known.kept, known.loss) if known is not None else (math.nan, None)
        starts, price = clock.starts(key, need.measure), list(_price(pace))
        yield Answer(need, *key, kept, gain, length, loss, word(loss, points), starts, price, key[1])


def _untimed(board: Board, clock: Clock, need: Need, losses: dict[Key, Standing], points: float) -> Iterator[Answer]:
    """Budgets that were scored and not timed, by their bytes over all scored prompts."""
    for key, gain in _scored_bytes(board, need.protocol).items():
        known = losses[key]
        if key in clock.keys or key[0].partition(":")[0] in CONTROLS or not _tells(known.loss, points):
            continue
        if gain.value > 1 + SLIGHT:
            pace = _nearest(clock, key)
            price = [one for one in _price(pace) if one[0] != "KV bytes"] if pace else []
            priced, said = pace.budget if pace else None, word(known.loss, points)
            yield Answer(need, *key, known.kept, gain, None, known.loss, said, "", price, priced)


def _scored_bytes(board: Board, protocol: str) -> dict[Key, Found]:
    """Full attention's bytes over everyone's that was scored, mean over samples."""
    return {
        (str(name), section.budget): Found(math.exp(logs.mean()), samples=len(logs))
        for section in board.judged(protocol)
        for name, logs in section.rows[section.rows["kv"].notna()].groupby("entrant")["kv"]
    }


def _nearest(clock: Clock, key: Key) -> Pace | None:
    """An entrant's times at the budget nearest to one that was not timed, at the longest prompts."""
    found = [pace for pace in clock.paces if pace.entrant == key[0]]
    return min(found, key=lambda pace: (abs(pace.budget - key[1]), -pace.length), default=None)


def _price(pace: Pace) -> Iterator[tuple[str, Found]]:
    for words, found in (("TTFT", pace.ttft), ("time a token", pace.tpot), ("KV bytes", pace.kv)):
        if found.value < 1 - SLIGHT and not found.high >= 1:
            yield words, found


def _tells(loss: Found, points: float) -> bool:
    return loss.sure and (loss.high - loss.low <= WIDEST or loss.high < -points)


def word(loss: Found | None, points: float) -> Word:
    """What is known of a loss that has an interval against a margin of so many points."""
    if loss is None:
        return "unknown"
    if loss.low >= -points:
        return "shown"
    if loss.value >= -points:
        return "open"
    return "doubtful" if loss.high >= -points else "loses"
