"""Goodput: how many requests a second were answered within a service level objective, from their records alone."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from harness.report import formats
from harness.report.recorded import Recorded
from harness.report.slo import Limit, good
from harness.report.table import Cell, Table, label, number
from harness.statistics.arrivals import duration, requests
from harness.statistics.comparable import arrived
from harness.statistics.together import batch_sizes


def goodput(run: Recorded, slo: Sequence[Limit]) -> Table:
    """One row a task and method that was timed: the share of its requests within all limits, and their rate.

    The rate is vLLM's goodput, requests within the limits over a duration. Where requests arrived at a rate that is the
    load's, and times begin with the arrival. Elsewhere it is the seconds that all requests took one after the other;
    those decoded together share their steps. A request without an answer is none of the good ones. TPOT is vLLM's mean;
    a request of one token has none, and keeps its limit.
    """
    rows = []
    for (task, method), group in run.contenders.groupby(["task", "method"], sort=False):
        times = _times(group)
        if times["e2e_s"].notna().any():
            rows.append(_row(str(task), str(method), times, slo))
    load = _load(run.contenders)
    limits = ", ".join(f"{limit.name.upper()} at most {formats.seconds(limit.seconds)}" for limit in slo)
    note = (
        f"Requests with {limits}; TPOT as vLLM has it, (E2E - TTFT) / (new tokens - 1). Goodput: such requests a "
        f"second. {_MEANING}"
    )
    head = ["task", "method", "n", "within", "share", "goodput, requests/s", "all, requests/s"]
    return Table("goodput", f"Goodput, {load}", note, head, rows, labels=2)


_MEANING = (
    "Where requests arrived at a rate, times begin with the arrival and the seconds are those from the first arrival "
    "to the last token. Elsewhere one was sent after the other, so that is not the goodput of a server under load."
)


def _times(group: pd.DataFrame) -> pd.DataFrame:
    """Of each request what `good` asks for, and `busy_s`: its part in the duration."""
    if arrived(group).any():
        loaded = requests(group)
        times = loaded[["ttft_s", "tpot_s", "e2e_s"]].assign(busy_s=duration(loaded) / len(loaded))
        return times.reindex(group.index)
    shared = (group["e2e_s"] - group["ttft_s"]) / batch_sizes(group)
    return pd.DataFrame(
        {
            "ttft_s": group["ttft_s"],
            "tpot_s": group["tpot_mean_s"],
            "e2e_s": group["e2e_s"],
            "busy_s": group["ttft_s"] + shared,
        }
    )


def _row(task: str, method: str, times: pd.DataFrame, slo: Sequence[Limit]) -> list[Cell]:
    within, busy = int(good(times, slo).sum()), float(times["busy_s"].sum())
    rates = (within / busy, float(times["e2e_s"].count()) / busy)
    share = within / len(times)
    return [
        label(task),
        label(method),
        number(len(times), str(len(times))),
        number(within, str(within)),
        number(share, formats.percent(share)),
        *(number(rate, f"{rate:.3g}") for rate in rates),
    ]


def _load(records: pd.DataFrame) -> str:
    """`batch 1, no queue`, `under load`, or both."""
    loaded = arrived(records)
    sizes = sorted(set(batch_sizes(records[~loaded])))
    alone = [f"batch {' and '.join(f'{size:.0f}' for size in sizes)}, no queue"] if sizes else []
    return "; ".join(alone + (["under load"] if loaded.any() else []))
