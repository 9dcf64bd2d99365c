"""Fronts: what an entrant wins against what it loses, with intervals; on the line is whom nobody beats in both.

Points without an interval are hollow and on no line. Names stand where there is room, those on the line first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from matplotlib.transforms import Bbox

from harness.leaderboard.board import CONTROLS, Clock, Section, at_budget
from harness.leaderboard.effects import Found
from harness.report.figures import canvas, colour_of, marker_of, tidy
from harness.report.plots import pareto

_LONG = 28
"""Characters of a name beside a point."""


_PLACES = ((5, 3), (5, -9), (-5, 3), (-5, -9), (0, 8), (0, -14))
"""Where a name may stand, points right of and above its own point."""


class _Point(NamedTuple):
    name: str
    gain: Found
    loss: Found

    @property
    def at(self) -> tuple[float, float]:
        return self.gain.value, self.loss.value


def front(sections: list[Section], clock: Clock, measure: str, words: str) -> Figure | None:
    """Loss in points over the ratio of a measure at the longest prompts, a budget a colour; None without points.

    Args:
        sections: of one model and protocol.
        clock: of the times.
        measure: "ttft", "tpot" or "kv".
        words: what the ratio is of.
    """
    found = {section.budget: _points(section, clock, measure) for section in sections}
    points = {budget: own for budget, own in found.items() if own}
    everyone = [point for own in points.values() for point in own]
    if not everyone:
        return None
    figure = canvas(8.5, 5.2)
    axes = figure.subplots()
    for index, (budget, own) in enumerate(points.items()):
        _scatter(axes, own, index, at_budget(budget))
    sure = [point for point in everyone if point.loss.sure]
    best = [sure[index] for index in pareto([(-point.gain.value, point.loss.value) for point in sure])]
    axes.plot(*_columns([one.at for one in best]), "--", color="#888888", linewidth=1)
    _frame(axes, words)
    figure.draw_without_rendering()
    _name(axes, [*best, *sorted((one for one in everyone if one not in best), key=lambda one: -one.loss.value)])
    return figure


def _scatter(axes: Axes, points: Sequence[_Point], index: int, name: str) -> None:
    colour, marker = colour_of(index), marker_of(index)
    for point in points:
        _cross(axes, point, colour)
    for filled in (True, False):
        ends = [point.at for point in points if point.loss.sure is filled]
        axes.plot(*_columns(ends), marker, color=colour, markerfacecolor=colour if filled else "none", markersize=5)
    axes.plot([], [], marker, color=colour, markersize=5, label=name)


def _frame(axes: Axes, words: str) -> None:
    axes.axhline(0, color="#bbbbbb", linewidth=0.8)
    axes.axvline(1, color="#bbbbbb", linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:.2g}x")
    axes.xaxis.set_minor_formatter("{x:.2g}x")
    least, most = axes.get_xlim()
    if most > 4 * least:  # else there is room for every digit
        axes.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.tick_params(which="both", labelsize=8)
    axes.set_xlabel(f"{words}: full attention over the method (log)")
    axes.set_ylabel("score less full attention's, points")
    axes.legend(frameon=False, fontsize=8)
    tidy(axes)


def _columns(ends: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in ends], [y for _, y in ends]


def _name(axes: Axes, points: Sequence[_Point]) -> None:
    """Names beside points of a drawn figure, where they cover neither points nor other names, or nowhere."""
    taken = [Bbox.from_bounds(x - 3, y - 3, 6, 6) for x, y in axes.transData.transform([one.at for one in points])]
    for point in points:
        for right, up in _PLACES:
            side = "left" if right > 0 else "right" if right < 0 else "center"
            text = axes.annotate(point.name, point.at, (right, up), textcoords="offset points", fontsize=6.5, ha=side)
            box = text.get_window_extent()
            if axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1 and not box.count_overlaps(taken):
                taken.append(box)
                break
            text.remove()


def _points(section: Section, clock: Clock, measure: str) -> list[_Point]:
    found = [(one, clock.longest((one.entrant, section.budget), measure)) for one in section.standings]
    return [
        _Point(_short(one.entrant), gain[1], one.loss)
        for one, gain in found
        if gain is not None and gain[1].value > 0 and math.isfinite(one.loss.value)
    ]


def _short(entrant: str) -> str:
    name = entrant if len(entrant) <= _LONG else entrant.partition(":")[0]
    return f"({name})" if name.partition(":")[0] in CONTROLS else name


def _cross(axes: Axes, point: _Point, colour: str) -> None:
    gain, loss = point.gain, point.loss
    if gain.sure:
        axes.plot((gain.low, gain.high), (loss.value, loss.value), color=colour, linewidth=0.7, alpha=0.5)
    if loss.sure:
        axes.plot((gain.value, gain.value), (loss.low, loss.high), color=colour, linewidth=0.7, alpha=0.5)
