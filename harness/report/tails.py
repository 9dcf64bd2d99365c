"""Latency as serving benchmarks report it: percentiles, and the mean time per token beside the median."""

from __future__ import annotations

from typing import Any

import pandas as pd

from harness.report import formats
from harness.report.summary import ITL_TAILS, TTFT_TAILS
from harness.report.table import Cell, Table, label, number
from harness.statistics.noise import TWIN
from harness.statistics.percentiles import PERCENTS, fewest

HEAD = [
    *("TPOT median", "TPOT mean", "n", *(f"TTFT p{percent}" for percent in PERCENTS)),
    *("gaps", *(f"ITL p{percent}" for percent in PERCENTS)),
]
NOTE = (
    "TPOT median: of the gaps between a request's tokens; TPOT mean: (E2E - TTFT) / (new tokens - 1), which is vLLM's "
    "TPOT; medians over the requests of both. ITL: the gaps between tokens, of all requests together. A percentile is "
    "given where its values are enough for one of them to lie above it with 95 % probability: "
    f"{fewest(90)} for p90, {fewest(99)} for p99. "
    "Nothing waits in a queue, so these are no server's percentiles under load."
)


def tails(summary: pd.DataFrame) -> Table:
    """One row a task and method of `harness.report.summary.summarise`; none where nothing has a 90th percentile."""
    known = summary[summary["method"] != TWIN]
    some = known[[*TTFT_TAILS[1:], *ITL_TAILS[1:]]].notna().any(axis=None)
    rows = [_row(row) for row in known.to_dict("records")] if some else []
    return Table("tails", "Percentiles of latency", NOTE, ["task", "method", *HEAD], rows, labels=2)


def _row(row: dict[Any, Any]) -> list[Cell]:
    cells = [label(row["task"]), label(row["method"])]
    cells += [number(row[name], formats.seconds(row[name])) for name in ("tpot_s", "tpot_mean_s")]
    for count, percentiles in (("ttft_n", TTFT_TAILS), ("itl_n", ITL_TAILS)):
        cells.append(number(row[count], str(row[count])))
        cells += [number(row[name], formats.seconds(row[name])) for name in percentiles]
    return cells
