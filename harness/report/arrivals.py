"""Requests that arrived at a rate: what a load of them took, by rate, with the queue and without."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.report import formats
from harness.report.figures import canvas, colour_of, legend, marker_of, names_of, tidy
from harness.report.slo import Limit, good
from harness.report.table import Cell, Table, label, number
from harness.statistics.arrivals import duration, requests
from harness.statistics.noise import TWIN
from harness.statistics.percentiles import PERCENTS, fewest, percentile

_SERIES = {"TTFT": "ttft_s", "service TTFT": "service_ttft_s", "TPOT": "tpot_s"}
_NOTE = (
    "Rate: requests that were to arrive a second, at random, the same ones at the same seconds for every method. "
    "Requests/s and tokens/s: those that were answered, over the time from the first arrival to the last token. TTFT: "
    "from a request's arrival, its time in the queue included; service TTFT: from the start of its prefill. TPOT: "
    "vLLM's, (last token - first token) / (new tokens - 1), with others' prefills in between. A percentile needs "
    f"{fewest(90)} requests for p90, {fewest(99)} for p99. Batch: mean number of requests in a decode step. Steps: "
    "replayed as CUDA graphs, or launched anew, which takes longer. Energy/token: joules of the GPU over the whole "
    "load, its rest between requests included, over all new tokens. A load is one measurement, so nothing is tested."
)


def arrivals(records: pd.DataFrame, methods: Sequence[str] = ()) -> Table:
    """One row a task and method that was asked at a rate; none where nothing was.

    Args:
        records: one row a record.
        methods: labels in the order to list them in; others follow as they appear.
    """
    columns = [f"{name} p{percent}" for name in _SERIES for percent in PERCENTS]
    head = ["task", "method", "rate", "n", "requests/s", "tokens/s", *columns, "batch", "steps", "energy/token"]
    rows = [_row(task, method, group) for task, method, group in _groups(records, methods)]
    return Table("load", "Requests arriving at a rate", _NOTE, head, rows, labels=2)


def _groups(records: pd.DataFrame, methods: Sequence[str]) -> list[tuple[str, str, pd.DataFrame]]:
    """Task, method and `requests`, by task."""
    found = requests(records[records["method"] != TWIN])
    order = list(dict.fromkeys([*methods, *found["method"]]))
    groups = [
        (str(task), str(method), group) for (task, method), group in found.groupby(["task", "method"], sort=False)
    ]
    tasks = list(dict.fromkeys(found["task"]))
    return sorted(groups, key=lambda one: (tasks.index(one[0]), order.index(one[1])))


def _row(task: str, method: str, group: pd.DataFrame) -> list[Cell]:
    seconds, rate = duration(group), float(group["rate"].iloc[0])
    rates = (len(group) / seconds, float(group["new_tokens"].sum()) / seconds)
    series = [(group[column], percent) for column in _SERIES.values() for percent in PERCENTS]
    together, joules = _together(group), float(group["energy_j"].sum(min_count=1) / group["new_tokens"].sum())
    return [
        label(task),
        label(method),
        number(rate, f"{rate:g}"),
        number(len(group), str(len(group))),
        *(number(each, formats.rate(each)) for each in rates),
        *(_percentile(values, percent) for values, percent in series),
        number(together, formats.rate(together)),
        Cell(_steps(group)),
        number(joules, formats.joules(joules)),
    ]


def _percentile(values: pd.Series[float], percent: int) -> Cell:
    found = percentile(values, percent)
    return number(found, formats.seconds(found))


def _together(group: pd.DataFrame) -> float:
    """Tokens a decode step: a step of so many requests is in the records of as many."""
    shares = [1 / size for sizes in group["batch_sizes"] for size in sizes]
    return len(shares) / sum(shares) if shares else math.nan


def _steps(group: pd.DataFrame) -> str:
    kinds = set(group["replayed"])
    return "some replayed" if len(kinds) > 1 else "replayed" if True in kinds else "launched"


def arrivals_figure(records: pd.DataFrame, methods: Sequence[str], slo: Sequence[Limit] = ()) -> Figure | None:
    """TTFT over the rate, and goodput where there are limits; None where no task was asked at several rates.

    Args:
        records: one row a record.
        methods: labels in the order of the run.
        slo: limits of goodput.
    """
    points = _points(records, methods, slo)
    several = points.groupby("what")["rate"].nunique() > 1 if len(points) else pd.Series(dtype=bool)
    panels = [str(what) for what, is_several in several.items() if is_several]
    if not panels:
        return None
    rows = 2 if slo else 1
    figure = canvas(max(6.0, 1.0 + 4.4 * len(panels)), 0.8 + 3.6 * rows)
    drawn = figure.subplots(rows, len(panels), squeeze=False)
    for column, what in zip(drawn.T, panels, strict=True):
        _draw_task(column, points[points["what"] == what], methods, what)
    labels = (f"TTFT from arrival, p{_percent(points)}, seconds", "goodput, requests/s")
    for axes, text in zip(drawn[:, 0], labels, strict=False):
        axes.set_ylabel(text)
    legend(figure)
    return figure


def _points(records: pd.DataFrame, methods: Sequence[str], slo: Sequence[Limit]) -> pd.DataFrame:
    """A row a task and method with a finite rate: what was asked apart from the rate, and what came of it."""
    rows: list[dict[str, Any]] = []
    groups = [one for one in _groups(records, methods) if math.isfinite(one[2]["rate"].iloc[0])]
    for task, method, group in groups:
        found = {"what": re.sub(r":rate=[^:]*", "", task), "method": method, "rate": float(group["rate"].iloc[0])}
        tails = {f"p{percent}": percentile(group["ttft_s"], percent) for percent in PERCENTS}
        rows.append(found | tails | {"good": good(group, slo).sum() / duration(group)})
    points = pd.DataFrame(rows)
    return points.assign(ttft=points[f"p{_percent(points)}"]) if rows else points


def _percent(points: pd.DataFrame) -> int:
    """The 90th percentile where all loads have one, else the median."""
    return 90 if points["p90"].notna().all() else 50


def _draw_task(column: Sequence[Axes], points: pd.DataFrame, methods: Sequence[str], title: str) -> None:
    """TTFT, and goodput below it where there is a second plot."""
    ttft, *goodput = column
    _draw(ttft, points, methods, "ttft")
    ttft.set(yscale="log", title=title)
    ttft.title.set_fontsize(9)
    ttft.yaxis.set_major_formatter("{x:g}")
    ttft.yaxis.set_minor_formatter("{x:g}")
    ttft.tick_params(which="minor", labelsize=8)
    for axes in goodput:
        _draw(axes, points, methods, "good")
        axes.set_ylim(bottom=0)


def _draw(axes: Axes, points: pd.DataFrame, methods: Sequence[str], column: str) -> None:
    names = names_of(methods)
    for index, method in enumerate(methods):
        own = points[points["method"] == method].sort_values("rate")
        style: dict[str, Any] = {"color": colour_of(index), "marker": marker_of(index)}
        axes.plot(list(own["rate"]), list(own[column]), label=names[method], **style)
    axes.set_xlabel("requests that arrive a second")
    tidy(axes)
