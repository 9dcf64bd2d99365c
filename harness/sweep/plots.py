"""One picture an axis: accuracy and time to first token along it, each point with its paired interval."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.report.figures import canvas, colour_of, legend, marker_of, tidy
from harness.statistics.paired import REFERENCE
from harness.sweep.results import Axis, Reading

_LONG_LABEL = 28
_WIDTH = 0.5
"""Of the places at one value, so that intervals of different lines stand side by side."""


def file_name(axis: Axis) -> str:
    """Name of an axis' plot, without its ending."""
    return "axis-" + re.sub(r"[^A-Za-z0-9.=-]+", "-", axis.name)


def axis_figure(axis: Axis, title: str) -> Figure | None:
    """Accuracy and TTFT speed-up over the values of an axis; None where neither was measured.

    Bars are 95 % intervals of the paired difference from, and ratio to, full attention.
    """
    panels = [panel for panel in (_accuracy, _speed) if any(_known(panel(reading)) for reading in axis.readings)]
    if not panels:
        return None
    figure = canvas(1.5 + max(4.0, 0.9 * len(axis.values)) * len(panels), 4.0 + 0.12 * len(axis.lines))
    titles = {_accuracy: "score in %", _speed: "TTFT speed-up over full"}
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw(axes, axis, [(reading, panel(reading)) for reading in axis.readings])
        axes.set_title(titles[panel], fontsize=10)
    _, labels = figure.axes[0].get_legend_handles_labels()
    legend(figure, columns=1 if max(map(len, labels)) > _LONG_LABEL else 2)
    figure.suptitle(f"{title}: {axis.name}", fontsize=11)
    return figure


def _accuracy(reading: Reading) -> tuple[float, float, float]:
    """Score with the interval of its difference from full attention's, moved to it."""
    middle, low, high = reading.points
    ends = np.clip([reading.score + low - middle, reading.score + high - middle], 0, 100)
    return reading.score, float(ends[0]), float(ends[1])


def _speed(reading: Reading) -> tuple[float, float, float]:
    return reading.speed if reading.line != REFERENCE else (1.0, 1.0, 1.0)


def _known(values: tuple[float, float, float]) -> bool:
    return math.isfinite(values[0])


def _draw(axes: Axes, axis: Axis, points: list[tuple[Reading, tuple[float, float, float]]]) -> None:
    for index, line in enumerate(axis.lines):
        own = [(axis.values.index(reading.x), values) for reading, values in points if reading.line == line]
        own = [(x, values) for x, values in own if _known(values)]
        shift = _WIDTH * ((index + 0.5) / len(axis.lines) - 0.5)
        xs, ys = [x + shift for x, _ in own], [values[0] for _, values in own]
        style: dict[str, Any] = {"color": colour_of(index), "marker": marker_of(index), "markersize": 5}
        dashes = "--" if line == REFERENCE else ("-", "-.", ":")[index // 7 % 3]
        axes.plot(xs, ys, label=line, linestyle=dashes, linewidth=1.2, **style)
        for x, (_, low, high) in zip(xs, (values for _, values in own), strict=True):
            if math.isfinite(low) and math.isfinite(high):
                axes.plot((x, x), (low, high), color=colour_of(index), linewidth=1.2)
    axes.set_xticks(range(len(axis.values)), axis.values, fontsize=8, rotation=30 if _long(axis) else 0)
    axes.set_xlim(-0.5, len(axis.values) - 0.5)
    axes.set_xlabel(axis.name)
    tidy(axes)


def _long(axis: Axis) -> bool:
    return max(map(len, axis.values)) > 10
