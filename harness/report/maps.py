"""Two maps: which tokens of a prompt survived in which layer, and which needles were found."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from harness.report.figures import canvas, names_of
from harness.report.recorded import Recorded
from harness.report.summary import BASELINE
from harness.storage.spans import bin_edges, every_layer

_BINS = 512
_PANELS = 6
_MOST_INCHES = 10

Spans = list[list[tuple[int, int]]]


def kept_spans(extra: Mapping[str, Any]) -> Spans | None:
    """`extra["kept_spans"]`: [layer] -> [start, end) of the prompt positions kept; None where it is not recorded."""
    found = extra.get("kept_spans")
    return [[(start, end) for start, end in layer] for layer in every_layer(found)] if found else None


def needle_spans(extra: Mapping[str, Any]) -> list[tuple[int, int]]:
    """`extra["needles"]`: [start, end) of the prompt positions of what has to be found; empty where unknown."""
    return [(int(start), int(end)) for start, end in extra.get("needles") or []]


def needle_kept(spans: Sequence[Sequence[int]], needle: tuple[int, int]) -> int:
    """How many of a needle's tokens are inside these spans, which do not overlap."""
    first, last = needle
    return sum(min(end, last) - max(start, first) for start, end in spans if start < last and end > first)


def dropped_at(extra: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """The first layer that lacks a token of a needle, how many tokens of that needle it has, and of how many.

    None where every layer has every needle, or it is not recorded.
    """
    needles = needle_spans(extra)
    for layer, spans in enumerate(extra.get("kept_spans") or []):
        for needle in needles if spans is not None else ():  # None: the same as the layer before
            found, size = needle_kept(spans, needle), needle[1] - needle[0]
            if found < size:
                return layer, found, size
    return None


def shares_near_needle(extra: Mapping[str, Any], tokens: int) -> list[float]:
    """For each layer the share that it kept of the pieces of the prompt in which the needles lie, the least of them.

    Args:
        extra: of a record whose `kept_shares` say what was kept.
        tokens: of the prompt.
    """
    shares = np.array(every_layer(extra["kept_shares"]))
    edges = bin_edges(tokens, shares.shape[1])
    near = np.zeros(shares.shape[1], dtype=bool)
    for first, last in needle_spans(extra):
        near |= (edges[:-1] < last) & (edges[1:] > first)
    least: list[float] = shares[:, near].min(1, initial=1).tolist()
    return least


def kept_image(extra: Mapping[str, Any], tokens: int) -> NDArray[np.float64] | None:
    """[layers, pieces of the prompt] share that each layer kept, from spans or shares; None where none are recorded."""
    if spans := kept_spans(extra):
        return survival(spans, tokens)
    shares = extra.get("kept_shares")
    return np.array(every_layer(shares)) if shares else None


def survival(spans: Spans, tokens: int, bins: int = _BINS) -> NDArray[np.float64]:
    """[layers, at most bins] share of the tokens of each piece of the prompt that each layer kept, 0 to 1.

    Args:
        spans: [layer] -> [start, end) kept.
        tokens: of the prompt.
        bins: pieces of (nearly) the same size; a shorter prompt has one a token.
    """
    edges = bin_edges(tokens, bins)
    kept = np.zeros((len(spans), tokens))
    for row, layer in zip(kept, spans, strict=True):
        for start, end in layer:
            row[start:end] = 1
    shares: NDArray[np.float64] = np.add.reduceat(kept, edges[:-1], axis=1) / np.diff(edges)
    return shares


def survival_map(run: Recorded) -> Figure | None:
    """Layer x prompt position of one sample, a panel a method, the needle overlaid; None where it is not recorded.

    The sample is one whose answer a method lost, if there is one, else the first.
    """
    rows = _chosen(run)
    if not rows:
        return None
    names = names_of(run.methods)
    figure = canvas(8, 1.2 + 1.7 * len(rows))
    for axes, row in zip(figure.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0], rows, strict=True):
        _draw_survival(axes, row, names[row["method"]])
    figure.axes[-1].set_xlabel("prompt position (token)")
    colour_key = "blue: kept, white: pruned, orange lines: the needle's first and last token"
    figure.suptitle(f"{rows[0]['task']}, sample {rows[0]['sample']}; {colour_key}", fontsize=9)
    return figure


def _chosen(run: Recorded) -> list[dict[str, Any]]:
    frame = run.contenders[run.contenders["method"] != BASELINE]
    frame = frame[[bool(extra.get("kept_spans") or extra.get("kept_shares")) for extra in frame["extra"]]]
    if frame.empty:
        return []
    worst = frame.iloc[int(frame["score"].fillna(1).astype(float).to_numpy().argmin())]
    task, sample = worst["task"], worst["sample"]
    found = frame[(frame["task"] == task) & (frame["sample"] == sample)]
    return [{str(key): row[key] for key in row} for row in found.to_dict("records")][:_PANELS]


def _draw_survival(axes: Axes, row: dict[str, Any], name: str) -> None:
    tokens = int(row["context_tokens"])
    image = kept_image(row["extra"], tokens)
    assert image is not None
    extent = (0.0, float(tokens), len(image) - 0.5, -0.5)
    axes.imshow(image, aspect="auto", cmap="Blues", vmin=0, vmax=1.25, extent=extent, interpolation="nearest")
    for start, end in needle_spans(row["extra"]):
        axes.axvline(start, color="#D55E00", linewidth=1)
        axes.axvline(end, color="#D55E00", linewidth=1)
    axes.set_ylabel("layer", fontsize=8)
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    score = "" if pd.isna(row["score"]) else f", score {row['score'] * 100:.0f} %"
    axes.set_title(f"{name}{score}", fontsize=9, loc="left")


def needle_map(run: Recorded) -> Figure | None:
    """Mean score for each length and depth of a needle, a block a suite, a panel a method; None where none has both.

    Suites are never mixed: a needle of one is not as hard to find as one of another.
    """
    frame = run.contenders[run.contenders["score"].notna()]
    depths = pd.Series([extra.get("depth") for extra in frame["extra"]], index=frame.index, dtype=object)
    frame = frame.assign(depth=pd.to_numeric(depths, errors="coerce"), suite=frame["task"].map(suite))
    frame = frame[frame["depth"].notna()]
    if frame.empty:
        return None
    blocks = [(str(name), part) for name, part in frame.groupby("suite", sort=False)]
    width = max(1.7, 0.8 + 0.5 * frame["length"].nunique())
    columns = min(len(run.methods), int(_MOST_INCHES / width))
    rows = [math.ceil(part["method"].nunique() / columns) for _, part in blocks]
    figure = canvas(max(4, 0.7 + width * columns), sum(0.7 + 2.4 * count for count in rows))
    places = figure.subfigures(len(blocks), 1, squeeze=False, height_ratios=rows)[:, 0]
    for place, (name, part), count in zip(places, blocks, rows, strict=True):
        _draw_suite(place, run, name, part, (count, columns))
    return figure


def suite(task: str) -> str:
    """A task's label without its options: `needle`, `retrieval/multikey`."""
    return task.partition(":")[0]


def _draw_suite(place: SubFigure, run: Recorded, name: str, frame: pd.DataFrame, grid: tuple[int, int]) -> None:
    methods = [method for method in run.methods if method in set(frame["method"])]
    panels = place.subplots(*grid, squeeze=False, sharex=True, sharey=True)
    for axes, method in zip(panels.ravel(), methods, strict=False):
        _draw_needles(axes, frame[frame["method"] == method])
        axes.set_title(names_of(run.methods)[method].replace(" ", "\n"), fontsize=9)
    for axes in panels.ravel()[len(methods) :]:
        axes.set_visible(False)
    place.suptitle(f"{name}: needles found, %", fontsize=11)
    place.supxlabel("prompt length in tokens", fontsize=9)
    place.supylabel("depth of the needle", fontsize=9)


def _draw_needles(axes: Axes, frame: pd.DataFrame) -> None:
    table = frame.pivot_table(index="depth", columns="length", values="score", aggfunc="mean") * 100
    values = table.to_numpy(dtype=float)
    axes.imshow(values, aspect="auto", cmap="cividis", vmin=0, vmax=100)
    axes.set_xticks(range(len(table.columns)), [str(length) for length in table.columns], fontsize=7)
    axes.set_yticks(range(len(table.index)), [f"{depth:.0%}" for depth in table.index], fontsize=7)
    if values.size <= 120:
        for (row, column), value in np.ndenumerate(values):
            colour = "black" if value > 55 else "white"
            text = "" if math.isnan(value) else f"{value:.0f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
