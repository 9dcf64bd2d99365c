"""When a published figure counts as reproduced: one rule for all claims.

A speed-up is judged by its 95 % interval, which comes from the same samples under both methods:

    holds           the whole interval reaches the figure
    does not hold   the whole interval stays below it
    undecided       the figure lies inside the interval, or there are too few samples for one
    not applicable  what was measured is not what the claim is about; the reason says why

A point above the figure with an interval that straddles it is *undecided*, not a success: the same run made again could
come out below. Bytes are counted, not sampled, so they have no interval: they hold within 1 % of the figure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from harness.gates.tolerance import Undecided

Word = Literal["holds", "does not hold", "undecided", "not applicable"]

SAID: dict[Word, tuple[str, str]] = {
    "holds": ("holds", "hold"),
    "does not hold": ("does not hold", "do not hold"),
    "undecided": ("is undecided", "are undecided"),
    "not applicable": ("is not applicable", "are not applicable"),
}
"""Word -> what one claim does, and several do."""

KV_TOLERANCE = 0.01


@dataclass(frozen=True)
class Claim:
    """What was published.

    Attributes:
        name: what it is about.
        figure: the number. unit: "x" or "GiB".
    """

    name: str
    figure: float
    unit: str


@dataclass(frozen=True)
class Measured:
    """What was found: a number with its 95 % interval, NaN where there is none."""

    value: float
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Judgement:
    """A claim, what was found, and the word for it; `reason` says in words where the word alone would not."""

    claim: Claim
    word: Word
    measured: Measured | None = None
    reason: str = ""


def at_least(claim: Claim, found: Measured) -> Judgement:
    """Judges a speed-up: does the interval reach the figure?"""
    if math.isnan(found.low) or math.isnan(found.high):
        return Judgement(claim, "undecided", found, "too few samples for an interval")
    if found.low >= claim.figure:
        return Judgement(claim, "holds", found)
    if found.high < claim.figure:
        return Judgement(claim, "does not hold", found)
    return Judgement(claim, "undecided", found, "the figure lies within the interval")


def near(claim: Claim, found: Measured, tolerance: float = KV_TOLERANCE) -> Judgement:
    """Judges a count: is it within `tolerance`, a share of the figure?"""
    apart = abs(found.value / claim.figure - 1)
    word: Word = "holds" if apart <= tolerance else "does not hold"
    return Judgement(claim, word, found, "" if word == "holds" else f"{apart * 100:.1f} % apart")


def not_applicable(claim: Claim, reason: str) -> Judgement:
    """A claim that this run says nothing about."""
    return Judgement(claim, "not applicable", None, reason)


def exit_code(judgements: Sequence[Judgement], undecided: Undecided) -> int:
    """1 where a claim does not hold, or is undecided and that is to fail; else 0."""
    failing = {"does not hold"} | ({"undecided"} if undecided == "fail" else set())
    return int(any(judgement.word in failing for judgement in judgements))


def summary(judgements: Sequence[Judgement]) -> str:
    """One line: how many claims got which word, in the order of `SAID`."""
    words = [judgement.word for judgement in judgements]
    counts = [f"{words.count(word)} {SAID[word][words.count(word) != 1]}" for word in SAID if word in words]
    return f"Of {len(words)} claims {', '.join(counts)}"
