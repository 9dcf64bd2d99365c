"""From which prompt length on a method wins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from harness.report import formats
from harness.report.effects import verdict
from harness.report.recorded import Recorded
from harness.report.summary import BASELINE
from harness.report.table import Cell, Table, label, number

_MEASURES = {"ttft": ("TTFT", "sooner from"), "e2e": ("E2E", "faster in all from")}


class Crossing(NamedTuple):
    """Where a method begins to be faster, for good as far as was measured.

    Attributes:
        low: the longest measured length at which it is not faster; 0 where it is at all of them.
        high: the next one, from which on it is; infinite where it is not faster at the longest.
        at: between those, interpolated linearly in both logarithms; NaN where one of them was not measured.
    """

    low: float
    high: float
    at: float = math.nan


def crossing(lengths: Sequence[float], ratios: Sequence[float]) -> Crossing | None:
    """Where ratios begin to stay above 1.

    Args:
        lengths: ascending.
        ratios: time of full attention over the method's at those lengths; those that are NaN or not positive are
            left out.

    Returns:
        None where no ratio is known.
    """
    known = [(x, math.log(ratio)) for x, ratio in zip(lengths, ratios, strict=True) if 0 < ratio < math.inf]
    if not known:
        return None
    last = next((index for index in reversed(range(len(known))) if known[index][1] <= 0), -1)
    if last < 0:
        return Crossing(0, known[0][0])
    if last == len(known) - 1:
        return Crossing(known[-1][0], math.inf)
    (x0, y0), (x1, y1) = known[last : last + 2]
    return Crossing(x0, x1, math.exp(math.log(x0) + math.log(x1 / x0) * -y0 / (y1 - y0)))


def crossing_of(run: Recorded, method: str, measure: str) -> Crossing | None:
    """The same for the paired ratios of a run."""
    return crossing(run.lengths, _ratios(run, method, measure))


def crossovers(run: Recorded) -> Table:
    """One row a method: from which length on it is sooner, and faster in all; none below two lengths."""
    methods = [method for method in run.methods if method != BASELINE] if len(run.lengths) > 1 else []
    rows = [[label(method), *(cell for name in _MEASURES for cell in _cells(run, method, name))] for method in methods]
    head = [text for name, begins in _MEASURES.values() for text in (begins, f"{name} verdict at the longest")]
    note = (
        "Prompt tokens from which on a method is faster at every longer prompt that was measured: it lies between the "
        "two measured lengths named, the number itself is interpolated in both logarithms. Beside it stands what the "
        "paired test says at the longest length. E2E holds for as many new tokens as were asked for: the fewer, the "
        "more the prefill counts."
    )
    return Table("crossover", "From which length on methods win", note, ["method", *head], rows)


def _cells(run: Recorded, method: str, measure: str) -> list[Cell]:
    ratios = _ratios(run, method, measure)
    if (found := crossing(run.lengths, ratios)) is None:
        return [Cell(formats.NOTHING), Cell(formats.NOTHING)]
    longest = max(length for length, ratio in zip(run.lengths, ratios, strict=True) if not math.isnan(ratio))
    text = _text(found, ever=any(ratio > 1 for ratio in ratios))
    high = None if math.isinf(found.high) else found.high
    return [number(found.at, text, found.low, high), verdict(run.effects_by_length[str(longest), method], measure)]


def _text(found: Crossing, ever: bool) -> str:
    if math.isinf(found.high):
        return f"not at {found.low:.0f}, the longest" if ever else f"at no length measured, up to {found.low:.0f}"
    if not found.low:
        return f"{found.high:.0f} or less, the shortest"
    return f"{found.at:.0f}, between {found.low:.0f} and {found.high:.0f}"


def _ratios(run: Recorded, method: str, measure: str) -> list[float]:
    effects = [run.effects_by_length.get((str(length), method), {}) for length in run.lengths]
    return [effect.get(f"{measure}_ratio", math.nan) for effect in effects]
