"""Fronts: what an entrant wins against what it loses, with intervals; on the line is whom nobody beats in both."""

from __future__ import annotations

import math
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.leaderboard.board import CONTROLS, Clock, Section
from harness.leaderboard.effects import Found
from harness.report.figures import canvas, colour_of, marker_of, tidy
from harness.report.plots import pareto

_LONG = 28
"""Characters of a name beside a point."""


class _Point(NamedTuple):
    name: str
    gain: Found
    loss: Found


def front(sections: list[Section], clock: Clock, measure: str, words: str) -> Figure | None:
    """Loss in points over the ratio of a measure at the longest prompts, a budget a colour; None without points.

    Args:
        sections: of one model and protocol.
        clock: of the times.
        measure: "ttft", "tpot" or "kv".
        words: what the ratio is of.
    """
    points = {section.budget: _points(section, clock, measure) for section in sections}
    everyone = [point for own in points.values() for point in own]
    if not everyone:
        return None
    figure = canvas(8.5, 5.2)
    axes = figure.subplots()
    for index, (budget, own) in enumerate(points.items()):
        for point in own:
            _cross(axes, point, colour_of(index))
        xs, ys = [point.gain.value for point in own], [point.loss.value for point in own]
        name = f"{budget:.3g} kept" if budget else "as asked for"
        axes.plot(xs, ys, marker_of(index), color=colour_of(index), markersize=5, label=name)
    best = [everyone[index] for index in pareto([(-point.gain.value, point.loss.value) for point in everyone])]
    axes.plot([one.gain.value for one in best], [one.loss.value for one in best], "--", color="#888888", linewidth=1)
    for point in best:
        axes.annotate(point.name, (point.gain.value, point.loss.value), (4, 4), textcoords="offset points", fontsize=7)
    axes.axhline(0, color="#bbbbbb", linewidth=0.8)
    axes.axvline(1, color="#bbbbbb", linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:.2g}x")
    axes.xaxis.set_minor_formatter("{x:.2g}x")
    axes.tick_params(which="both", labelsize=8)
    axes.set_xlabel(f"{words}: full attention over the method (log)")
    axes.set_ylabel("score less full attention's, points")
    axes.legend(frameon=False, fontsize=8)
    tidy(axes)
    return figure


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
