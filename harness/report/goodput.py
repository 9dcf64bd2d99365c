"""Goodput: how many requests a second were answered within a service level objective, from their records alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from harness.errors import InputError
from harness.report import formats
from harness.report.recorded import Recorded
from harness.report.table import Cell, Table, label, number

_COLUMNS = {"ttft": "ttft_s", "tpot": "tpot_mean_s", "e2e": "e2e_s"}
_LIMIT = re.compile(r"(\w+)=(\d+(?:\.\d+)?)(ms|s)")


class Limit(NamedTuple):
    """What one time of a request may be.

    Attributes:
        name: ttft, tpot or e2e.
        seconds: at most.
    """

    name: str
    seconds: float


def parse_slo(text: str) -> list[Limit]:
    """The limits of `ttft=2s,tpot=50ms`.

    Raises:
        InputError: anything else, or a time twice.
    """
    found = [_LIMIT.fullmatch(part.strip()) for part in text.split(",")]
    limits = [Limit(one[1], float(one[2]) / (1000 if one[3] == "ms" else 1)) for one in found if one]
    names = {limit.name for limit in limits}
    if len(names) < len(found) or not names <= _COLUMNS.keys() or not all(limit.seconds for limit in limits):
        raise InputError(f"--slo {text!r}: expected ttft=2s,tpot=50ms,e2e=5s, some of them, once each and above 0")
    return limits


def goodput(run: Recorded, slo: Sequence[Limit]) -> Table:
    """One row a task and method that was timed: the share of its requests within all limits, and their rate.

    The rate is vLLM's goodput, requests within the limits over a duration, where the duration is not that of a
    benchmark under load but the seconds that all requests took one after the other; those decoded together share their
    steps. A request without an answer is none of the good ones. TPOT is vLLM's mean; a request of one token has none,
    and keeps its limit.
    """
    rows = []
    for (task, method), group in run.contenders.groupby(["task", "method"], sort=False):
        if group["e2e_s"].notna().any():
            rows.append(_row(str(task), str(method), group, slo))
    load, limits = (
        _load(run.contenders),
        ", ".join(f"{limit.name.upper()} at most {formats.seconds(limit.seconds)}" for limit in slo),
    )
    note = (
        f"Requests with {limits}; TPOT as vLLM has it, (E2E - TTFT) / (new tokens - 1). Goodput: such requests a "
        f"second where one is sent after the other ({load}), so not that of a server under load."
    )
    head = ["task", "method", "n", "within", "share", "goodput, requests/s", "all, requests/s"]
    return Table("goodput", f"Goodput, {load}", note, head, rows, labels=2)


def _row(task: str, method: str, group: pd.DataFrame, slo: Sequence[Limit]) -> list[Cell]:
    good, busy = int(_within(group, slo).sum()), _seconds(group)
    rates = (good / busy, float(group["e2e_s"].count()) / busy)
    share = good / len(group)
    return [
        label(task),
        label(method),
        number(len(group), str(len(group))),
        number(good, str(good)),
        number(share, formats.percent(share)),
        *(number(rate, f"{rate:.3g}") for rate in rates),
    ]


def _batch(records: pd.DataFrame) -> pd.Series[float]:
    """Requests that were decoded together."""
    return records.get("batch", pd.Series(1.0, records.index)).astype(float).fillna(1.0)


def _load(records: pd.DataFrame) -> str:
    sizes = sorted(set(_batch(records)))
    return f"batch {' and '.join(f'{size:.0f}' for size in sizes)}, no queue"


def _seconds(group: pd.DataFrame) -> float:
    """All prefills, one by one, and all steps, each counted once."""
    return float((group["ttft_s"] + (group["e2e_s"] - group["ttft_s"]) / _batch(group)).sum())


def _within(group: pd.DataFrame, slo: Sequence[Limit]) -> pd.Series[bool]:
    kept = group["e2e_s"].notna()
    for limit in slo:
        seconds = group[_COLUMNS[limit.name]]
        kept &= (seconds <= limit.seconds) | ((limit.name == "tpot") & seconds.isna())
    return kept
