"""Accuracy against turn: what methods that saw no later question have left for it."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.report import formats
from harness.report.figures import canvas, colour_of, legend, marker_of, names_of, tidy
from harness.report.recorded import Recorded
from harness.report.summary import BASELINE
from harness.report.table import Cell, Table, label, number
from harness.statistics.paired import compare
from harness.statistics.turns import turn

_PANELS = 4
_PARTS = ("first", "later")

Effects = dict[tuple[str, str], dict[Hashable, Any]]
"""(what is told apart, method) -> row of `harness.statistics.paired.compare`."""


def turns(run: Recorded) -> Table:
    """One row a task and method: score and loss at the first turn and at the later ones; no row without turns."""
    rows = []
    for task, records in _conversations(run):
        effects = _effects(records, "part")
        contexts, asked = records[records["turn"] == 1]["sample"].nunique(), records["turn"].max()
        for method in run.methods:
            if method in set(records["method"]):
                own = records[records["method"] == method]
                parts = [(own[own["part"] == part], effects.get((part, method), {})) for part in _PARTS]
                cells = [cell for part in parts for cell in _part_cells(*part)]
                rows.append([label(method), label(task), number(contexts, f"{contexts} x {asked}"), *cells])
    note = (
        f"Points are of the paired difference from {BASELINE} at the same turns, with 95 % intervals in which contexts "
        "count, not questions. A later turn finds what the first has left in the cache; its TTFT is that of its own "
        "tokens. Asked apart, each question had a prefill."
    )
    head = ["method", "task", "contexts x turns"]
    for part in _PARTS:
        head += [f"{part}: score %", f"{part}: against full, points", f"{part}: TTFT"]
    return Table("turns", "First and later turns", note, head, rows, labels=2)


def _part_cells(records: pd.DataFrame, effect: dict[Hashable, Any]) -> list[Cell]:
    score, seconds = records["score"].mean() * 100, records["own_ttft_s"].median()
    ends = [effect.get(f"score_{name}") for name in ("difference", "low", "high")]
    text = formats.NOTHING if ends[0] is None else formats.points(*ends)
    return [
        number(score, formats.score(score)),
        number(ends[0], text, ends[1], ends[2]),
        number(seconds, formats.seconds(seconds)),
    ]


def against_turn(run: Recorded) -> Figure | None:
    """Accuracy over turn, a panel a task; None without turns. Bars: paired interval of the difference from full."""
    found = _conversations(run)[:_PANELS] if run.scored else []
    if not found:
        return None
    figure = canvas(max(7.6, 1 + 4.6 * len(found)), 4.4)
    panels = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
    for axes, (task, records) in zip(panels, found, strict=True):
        _draw(axes, run, records)
        axes.set_title(task, fontsize=9)
    panels[0].set_ylabel("accuracy in %")
    legend(figure)
    figure.suptitle(f"{run.manifest.model}\n{formats.protocol(run.manifest)}", fontsize=9)
    return figure


def _draw(axes: Axes, run: Recorded, records: pd.DataFrame) -> None:
    effects, means = _effects(records, "turn"), records.groupby(["turn", "method"])["score"].mean() * 100
    numbers = sorted(records["turn"].unique())
    names = names_of(run.methods)
    for index, method in enumerate(run.methods):
        scores = [float(means.get((each, method), math.nan)) for each in numbers]
        # Beside each other, so that equal scores and their bars are all seen.
        places = [each + (index - (len(run.methods) - 1) / 2) * 0.05 for each in numbers]
        bars = [_bar(effects.get((str(each), method), {}), score) for each, score in zip(numbers, scores, strict=True)]
        ends = [[bar[side] for bar in bars] for side in (0, 1)]
        style: dict[str, Any] = {"color": colour_of(index), "marker": marker_of(index), "markersize": 5}
        axes.errorbar(places, scores, ends, label=names[method], capsize=2, linewidth=1.4, elinewidth=0.9, **style)
    counts = records[records["method"] == records["method"].iloc[0]]["turn"].value_counts()
    axes.set_xticks(numbers, [f"{each}\nn = {counts.get(each, 0)}" for each in numbers], fontsize=8)
    axes.set(xlabel="turn", ylim=(-4, 104))
    tidy(axes)


def _bar(effect: dict[Hashable, Any], score: float) -> tuple[float, float]:
    """How far down and up from a score its interval reaches, within 0 to 100; nothing where there is none."""
    down, up, middle = (float(effect.get(f"score_{name}", math.nan)) for name in ("low", "high", "difference"))
    if not math.isfinite(down + up + score):
        return 0.0, 0.0
    return min(middle - down, score), min(up - middle, 100 - score)


def _conversations(run: Recorded) -> list[tuple[str, pd.DataFrame]]:
    """Task, and its records with columns `turn` and `part`, for each task of which some have turns."""
    frame = run.contenders.assign(turn=pd.to_numeric(run.contenders["extra"].map(turn)))
    frame = frame[frame["turn"].notna()]
    frame = frame.assign(turn=frame["turn"].astype(int), part=frame["turn"].map(lambda each: _PARTS[each > 1]))
    return [(str(task), records) for task, records in frame.groupby("task", sort=False)]


def _effects(records: pd.DataFrame, by: str) -> Effects:
    return {(row["task"], row["method"]): row for row in compare(records, by=by).to_dict("records")}
