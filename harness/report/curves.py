"""Times and memory against prompt length, where a method starts to win, and where the time to first token goes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from harness.report import formats
from harness.report.crossover import crossing_of
from harness.report.figures import canvas, colour_of, legend, marker_of, names_of, tidy
from harness.report.recorded import Recorded
from harness.report.summary import BASELINE

_PANELS = (
    ("ttft_s", "prefill_floor_s", "time to first token (s)", "ttft"),
    ("tpot_s", "decode_floor_s", "time per token after it (s)", "tpot"),
    ("peak_memory_bytes", "", "peak memory (GiB)", ""),
)
_Shares = tuple[float, ...]
_HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo")


def against_length(run: Recorded) -> Figure | None:
    """TTFT, TPOT and peak memory over prompt length, log-log, with roofline floors; None below two lengths."""
    panels = [panel for panel in _PANELS if run.by_length[panel[0]].notna().any()]
    if len(run.lengths) < 2 or not panels:
        return None
    figure = canvas(4.4 * len(panels), 4.4)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw(axes, run, *panel)
    legend(figure)
    figure.suptitle(f"{run.manifest.model} on {formats.device(run.manifest)}", fontsize=11)
    return figure


def _draw(axes: Axes, run: Recorded, column: str, floor: str, title: str, measure: str) -> None:
    scale = 2.0**30 if column.endswith("bytes") else 1.0
    for index, (method, name) in enumerate(names_of(run.methods).items()):
        median, low, high = _quartiles(run, method, column)
        if median.empty:
            continue
        median, low, high = median / scale, low / scale, high / scale
        bars = np.array([median - low, high - median])
        style: dict[str, Any] = {
            "color": colour_of(index),
            "marker": marker_of(index),
            "markersize": 5,
            "linewidth": 1.4,
        }
        axes.errorbar(list(median.index), median, bars, label=name, capsize=2, **style)
        if floor:
            _draw_floor(axes, run, method, floor, colour_of(index))
        if measure:
            _mark_crossover(axes, run, method, measure, colour_of(index))
    axes.set(xscale="log", yscale="log", xlabel="prompt tokens", title=title)
    axes.set_xticks(run.lengths, [_tokens(length) for length in run.lengths], fontsize=8)
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    tidy(axes)


def _quartiles(run: Recorded, method: str, column: str) -> tuple[pd.Series[float], ...]:
    rows = run.records[(run.records["method"] == method) & run.records[column].notna()]
    groups = rows[column].astype(float).groupby(rows["length"])
    return groups.median(), groups.quantile(0.25), groups.quantile(0.75)


def _draw_floor(axes: Axes, run: Recorded, method: str, floor: str, colour: str) -> None:
    values = run.by_length[run.by_length.index.get_level_values("method") == method][floor].droplevel("method").dropna()
    label = "roofline (dotted, in the method's colour)" if method == run.methods[0] else None
    if not values.empty:
        axes.plot(list(values.index), values, color=colour, linestyle=":", linewidth=1.2, label=label)


def _mark_crossover(axes: Axes, run: Recorded, method: str, measure: str, colour: str) -> None:
    """A line where the method starts to win, if at the longest length the paired test says that it does."""
    effect = run.effects_by_length.get((str(run.lengths[-1]), method), {})
    found = crossing_of(run, method, measure)
    if found is not None and math.isfinite(found.at) and effect.get(f"{measure}_verdict") == "better":
        axes.axvline(found.at, color=colour, linestyle="--", linewidth=0.9)
        text = f" wins from {_tokens(round(found.at))}"
        height = 0.02 + 0.22 * (run.methods.index(method) % 4)
        axes.text(found.at, height, text, transform=axes.get_xaxis_transform(), color=colour, fontsize=8, rotation=90)


def _tokens(count: int) -> str:
    return f"{count // 1024}k" if count >= 1024 and count % 1024 == 0 else str(count)


def parts(run: Recorded) -> Figure | None:
    """Seconds of the parts of TTFT, stacked, a bar a method, at each length; None where they were not recorded."""
    known = run.contenders[run.contenders["parts_s"].notna()]
    if known.empty:
        return None
    table = pd.DataFrame(list(known["parts_s"]), index=known.index).fillna(0.0)
    means = known[["length", "method"]].join(table).groupby(["length", "method"]).mean()
    lengths = [int(length) for length in dict.fromkeys(means.index.get_level_values("length"))][-4:]
    figure = canvas(2.6 + 2.6 * len(lengths), 4.2)
    for axes, length in zip(figure.subplots(1, len(lengths), squeeze=False)[0], lengths, strict=True):
        _stack(axes, run, means[means.index.get_level_values("length") == length].droplevel("length"))
        axes.set_title(f"{length} tokens", fontsize=10)
    figure.axes[0].set_ylabel("seconds of the time to first token")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", frameon=False, fontsize=8)
    return figure


def _stack(axes: Axes, run: Recorded, table: pd.DataFrame) -> None:
    table = table.reindex([method for method in run.methods if method in table.index])
    names = names_of(run.methods)
    bottom = np.zeros(len(table))
    for index, part in enumerate(table.columns):
        heights = table[part].to_numpy(dtype=float)
        style: dict[str, Any] = {
            "color": colour_of(index + 1),
            "hatch": _HATCHES[index % len(_HATCHES)],
            "edgecolor": "white",
        }
        axes.bar(range(len(table)), heights, bottom=bottom, label=str(part), linewidth=0.5, **style)
        bottom += heights
    labels = [names[str(method)] for method in table.index]
    axes.set_xticks(range(len(table)), labels, fontsize=8, rotation=30, ha="right")
    tidy(axes)


def survivors(run: Recorded) -> Figure | None:
    """Share of the prompt's tokens that each layer keeps, mean over all samples: kept (line) and requested (dots)."""
    methods = [method for method in run.methods if method != BASELINE]
    if not methods:
        return None
    figure = canvas(7, 4)
    axes = figure.add_subplot()
    for (kept, asked), group in _alike(run, methods).items():
        colour = colour_of(run.methods.index(group[0]))
        axes.plot(kept, color=colour, label=_listed(run, group), drawstyle="steps-mid", linewidth=1.6)
        axes.plot(asked, color=colour, linestyle="none", marker=".", markersize=4)
    axes.set(xlabel="layer", ylabel="share of prompt tokens", ylim=(0, 1.05))
    axes.set_title("Kept after the prefill (line) and asked for (dots)", fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=8)
    tidy(axes)
    return figure


def _alike(run: Recorded, methods: list[str]) -> dict[tuple[_Shares, _Shares], list[str]]:
    """Methods by what they kept and asked for: of equal lines only the last would be seen."""
    groups: dict[tuple[_Shares, _Shares], list[str]] = {}
    for method in methods:
        kept, asked = (_shares(run, method, column) for column in ("tokens_kept", "tokens_requested"))
        groups.setdefault((kept, asked), []).append(method)
    return groups


def _listed(run: Recorded, methods: list[str]) -> str:
    """Names, three a line."""
    names = [names_of(run.methods)[method] for method in methods]
    return ",\n".join(", ".join(names[start : start + 3]) for start in range(0, len(names), 3))


def _shares(run: Recorded, method: str, column: str) -> _Shares:
    rows = run.records[run.records["method"] == method]
    shares = [np.array(found) / length for found, length in _counts(rows, column)]
    return tuple(round(float(value), 4) for value in np.mean(shares, axis=0))


def _counts(rows: pd.DataFrame, column: str) -> Iterator[tuple[list[int], int]]:
    return zip(rows[column], rows["context_tokens"], strict=True)
