"""The picture of a run: accuracy against time to first token, one point a method."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from harness.report import formats
from harness.report.summary import BASELINE, overall, shared
from harness.storage.store import Manifest

# Okabe & Ito's colours, which people with any colour vision tell apart; yellow is left out, it is too pale on white.
PALETTE = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vPX"

_LABELLED = 6
"""So many points can have their labels beside them; more get a legend."""


class Point(NamedTuple):
    """One method in the plot: TTFT in seconds, score in percent, what is written beside it, ends of intervals."""

    x: float
    y: float
    label: str
    method: str = ""
    xs: tuple[float, float] = (math.nan, math.nan)
    ys: tuple[float, float] = (math.nan, math.nan)


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other point beats, by ascending x: less x is better, more y is better.

    A point is beaten by one that is no worse in both and better in one; of equal points either all or none are on the
    front. Points with a NaN or an infinity are on no front.
    """
    finite = [index for index, point in enumerate(points) if all(map(math.isfinite, point))]
    front: list[int] = []
    best = -math.inf
    for index in sorted(finite, key=lambda index: (points[index][0], -points[index][1])):
        x, y = points[index]
        if y > best or (front and (x, y) == tuple(points[front[-1]])):
            front.append(index)
            best = y
    return front


def accuracy_ttft(manifest: Manifest, summary: pd.DataFrame, path: Path) -> bool:
    """Draws mean score (percent) over TTFT (seconds, geometric mean over tasks) as a PNG.

    Args:
        manifest: what the run is.
        summary: `harness.report.summary.summarise` of its records.
        path: the file to write.

    Returns:
        Whether there was a method with both a score and a time, so that a file was written.
    """
    figure = accuracy_ttft_figure(manifest, summary)
    if figure is None:
        return False
    figure.savefig(path, metadata={"Software": None})
    return True


def accuracy_ttft_figure(
    manifest: Manifest, summary: pd.DataFrame, effects: Mapping[str, Mapping[str, Any]] | None = None
) -> Figure | None:
    """The same as a figure; None where no method has both a score and a time.

    Args:
        manifest: what the run is.
        summary: `harness.report.summary.summarise` of its records.
        effects: method -> its row `all` of `paired.compare`; draws the paired intervals against full attention.
    """
    summary = shared(summary)
    points, missing = _points(overall(summary))
    if not points:
        return None
    crowded = len(points) > _LABELLED
    figure = Figure(figsize=(9.5 if crowded else 7.5, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    points = [with_interval(point, (effects or {}).get(point.method, {})) for point in points]
    _draw(axes, points)
    _explain(figure, axes, manifest, summary, missing)
    if crowded:
        figure.legend(loc="outside right upper", frameon=False, fontsize=8.5, labelspacing=0.7)
    else:
        _write_labels(figure, axes, points)
    return figure


def style_of(index: int) -> tuple[str, str]:
    """Colour and marker of the method with this place in the run; the first 49 have one of their own."""
    return PALETTE[index % len(PALETTE)], MARKERS[(index + index // len(PALETTE)) % len(MARKERS)]


def with_interval(point: Point, effect: Mapping[str, Any]) -> Point:
    """The point with the ends of its paired intervals: how far from full attention's it may lie, moved to the point."""
    low, high, ratio = (float(effect.get(f"ttft_{name}", math.nan)) for name in ("low", "high", "ratio"))
    down, up, middle = (float(effect.get(f"score_{name}", math.nan)) for name in ("low", "high", "difference"))
    xs = (point.x * ratio / high, point.x * ratio / low)
    ys = (point.y + down - middle, point.y + up - middle)
    return point._replace(xs=xs, ys=ys)


def _points(whole: pd.DataFrame) -> tuple[list[Point], list[str]]:
    """What can be drawn, and the methods that lack a score or a time."""
    names = short_names(list(whole["method"]))
    points, missing = [], []
    for row, name in zip(whole.to_dict("records"), names, strict=True):
        values = float(row["ttft_s"]), float(row["score"])
        known = row["method"] != BASELINE and not pd.isna(row["ttft_speedup"])
        speedup = f" {formats.times(row['ttft_speedup'])}" if known else ""
        if all(map(math.isfinite, values)):
            points.append(Point(*values, name + speedup, str(row["method"])))
        else:
            missing.append(name)
    return points, missing


def short_names(labels: list[str]) -> list[str]:
    """A method's bare name where only one has it, else its options too, one a line."""
    names = [label.partition(":")[0] for label in labels]
    return [
        name if names.count(name) == 1 else label.replace(":", "\n  ")
        for name, label in zip(names, labels, strict=True)
    ]


def _draw(axes: Axes, points: list[Point]) -> None:
    front = [points[index] for index in pareto([(point.x, point.y) for point in points])]
    # Steps, not slopes: between two methods there is nothing that anyone could choose.
    front_x, front_y = [point.x for point in front], [point.y for point in front]
    axes.plot(front_x, front_y, drawstyle="steps-post", color="#999999", linestyle="--", linewidth=1, zorder=1)
    crowded = len(points) > _LABELLED
    for index, point in enumerate(points):
        colour, marker = style_of(index)
        name = point.label.replace("\n ", "")
        axes.scatter(point.x, point.y, s=55, color=colour, marker=marker, zorder=3, label=name)
        axes.add_collection(LineCollection(_bars(point), colors=colour, linewidths=1.2, alpha=0.5 if crowded else 1))
    axes.margins(0.08 if crowded else 0.25)
    axes.autoscale_view()
    axes.set_xlim(left=max(0, axes.get_xlim()[0]))
    axes.set_ylim(max(-8, axes.get_ylim()[0]), min(110, axes.get_ylim()[1]))
    axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= 100])


def _bars(point: Point) -> list[list[tuple[float, float]]]:
    """The intervals as lines: across and upright, where they are known."""
    (left, right), (low, high) = point.xs, point.ys
    across = [[(left, point.y), (right, point.y)]] if math.isfinite(left + right) else []
    upright = [[(point.x, max(0.0, low)), (point.x, min(100.0, high))]] if math.isfinite(low + high) else []
    return across + upright


def _explain(figure: Figure, axes: Axes, manifest: Manifest, summary: pd.DataFrame, missing: list[str]) -> None:
    axes.set_xlabel("time to first token in seconds (median; geometric mean over tasks)")
    axes.set_ylabel("accuracy in % (mean over tasks)")
    axes.set_title(f"{manifest.model} on {formats.device(manifest)}", fontsize=11)
    axes.grid(color="#eeeeee")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    notes = [f"{_count(summary)}; 2.00x: half the time of {BASELINE}; dashed: best score within that time"]
    bars = any(collection.get_segments() for collection in axes.collections if isinstance(collection, LineCollection))
    notes += ["bars: 95 % interval of the paired difference from it"] if bars else []
    notes += [formats.status(manifest) or ""]
    notes += [f"not shown, no score or no time: {', '.join(missing)}"] if missing else []
    figure.supxlabel("\n".join(note for note in notes if note), fontsize=8, color="#555555")


def _count(summary: pd.DataFrame) -> str:
    tasks, least, most = int(summary["task"].nunique()), int(summary["n"].min()), int(summary["n"].max())
    each = f"{most}" if least == most else f"{least} to {most}"
    return f"{tasks} task{'s' * (tasks > 1)}, {each} sample{'s' * (most > 1)} each"


def _write_labels(figure: Figure, axes: Axes, points: list[Point]) -> None:
    """Puts each label beside its point where it covers no point, no interval and no other label, or the least."""
    figure.draw_without_rendering()
    taken = [_around(axes, point) for point in points]
    lines = [_box(axes, *ends) for point in points for ends in _bars(point)]
    for point in points:
        text = axes.annotate(point.label, point[:2], (0, 0), textcoords="offset points", fontsize=9)
        # The labels take part in no layout, or the axes would shrink after the places were found.
        text.set_in_layout(False)
        taken.append(_place(axes, text, taken, lines))


def _place(axes: Axes, text: Annotation, taken: list[Bbox], lines: list[Bbox]) -> Bbox:
    """Moves a label to the best of its places, the nearest of equals; a line across it is better than a label."""

    def move(dx: float, dy: float) -> Bbox:
        text.set(position=(dx, dy), ha=_side(dx, "left", "right"), va=_side(dy, "bottom", "top"))
        return text.get_window_extent()

    def faults(place: tuple[float, float]) -> tuple[int, int]:
        box = move(*place)
        return box.count_overlaps(taken) + (not _inside(axes.bbox, box)), box.count_overlaps(lines)

    return move(*min(_places(), key=faults))


def _places() -> Iterator[tuple[float, float]]:
    """Offsets in points, the near ones first, and of those the ones that the dashed line does not cross."""
    for distance in (8, 18, 30, 44, 60):
        for dx, dy in ((0, 1), (-1, 0), (1, 1), (-1, 1), (1, -1), (1, 0), (0, -1), (-1, -1)):
            yield dx * distance, dy * distance


def _side(offset: float, after: str, before: str) -> str:
    return "center" if offset == 0 else after if offset > 0 else before


def _box(axes: Axes, *ends: tuple[float, float]) -> Bbox:
    (x0, y0), (x1, y1) = axes.transData.transform(ends)
    return Bbox.from_extents(x0 - 1, y0 - 1, x1 + 1, y1 + 1)


def _around(axes: Axes, point: Point) -> Bbox:
    x, y = axes.transData.transform((point.x, point.y))
    return Bbox.from_extents(x - 9, y - 9, x + 9, y + 9)


def _inside(outer: Bbox, inner: Bbox) -> bool:
    return bool(outer.x0 <= inner.x0 and inner.x1 <= outer.x1 and outer.y0 <= inner.y0 and inner.y1 <= outer.y1)
