"""From records to one row for each method and task: what `summary.csv` holds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from harness.statistics.paired import ALL, REFERENCE, speedups

BASELINE = REFERENCE
COLUMNS = [
    *("method", "task", "n", "score", "ttft_s", "ttft_speedup", "tpot_s", "e2e_s", "e2e_speedup"),
    *("peak_memory_bytes", "kv_bytes", "kept_fraction"),
]

_DECIMALS = {"score": 2, "ttft_s": 6, "ttft_speedup": 4, "tpot_s": 6, "e2e_s": 6, "e2e_speedup": 4, "kept_fraction": 4}
_SECONDS = ["ttft_s", "tpot_s", "e2e_s"]
_BYTES = ["peak_memory_bytes", "kv_bytes"]
_TIMES = ["ttft_s", "ttft_speedup", "tpot_s", "e2e_s", "e2e_speedup"]


def summarise(records: pd.DataFrame, methods: Sequence[str] = (), tasks: Sequence[str] = ()) -> pd.DataFrame:
    """Sums up records (`harness.storage.store.load`), task by task, so that the methods of a task stand together.

    Args:
        records: one row a record.
        methods: labels in the order to list them in; others follow as they appear.
        tasks: likewise.

    Returns:
        `COLUMNS`: `n` answered requests, mean `score` in percent, medians of seconds and bytes, mean `kept_fraction`. A
        speed-up is the baseline's time divided by the method's on the same sample, averaged over samples as
        `harness.statistics.paired.compare` does it. What was not measured, and speed-ups in a run without the baseline,
        is NaN or NA.
    """
    groups = records.groupby(["method", "task"], sort=False)
    table = groups[[*_SECONDS, *_BYTES]].median()
    table = table.join(speedups(records)[["ttft", "e2e"]].add_suffix("_speedup"))
    table["n"] = groups["kept_fraction"].count()  # which a request without an answer lacks
    table["score"] = groups["score"].mean() * 100
    table["kept_fraction"] = groups["kept_fraction"].mean()
    table[_BYTES] = table[_BYTES].astype("Float64").round().astype("Int64")
    return ordered(table.reset_index(), methods, tasks)[COLUMNS].round(_DECIMALS)


def overall(summary: pd.DataFrame) -> pd.DataFrame:
    """One row a method over the tasks that every method has records of, so that no method gets the easier ones.

    Returns:
        The columns of `summary` with `tasks` (how many) for `task` and `n`: mean score and kept fraction, geometric
        means of seconds and speed-ups, largest peak memory, mean bytes of keys and values. What one of the tasks does
        not have, the whole does not have.
    """
    groups = shared(summary).groupby("method", sort=False)
    table = groups[["score", "kept_fraction"]].agg(_mean)
    table[_TIMES] = groups[_TIMES].agg(_geometric_mean)
    table["peak_memory_bytes"] = groups["peak_memory_bytes"].agg(lambda values: values.max(skipna=False))
    table["kv_bytes"] = groups["kv_bytes"].agg(_mean).astype("Float64").round().astype("Int64")
    table.insert(0, "tasks", groups.size())
    return table.reset_index()[["method", "tasks", *COLUMNS[3:]]]


def shared(summary: pd.DataFrame) -> pd.DataFrame:
    """The rows of those tasks that every method has records of."""
    holders = summary.groupby("task")["method"].transform("nunique")
    return summary[holders == summary["method"].nunique()]


def ordered(table: pd.DataFrame, methods: Sequence[str], tasks: Sequence[str]) -> pd.DataFrame:
    """Rows by task, then by method, in the order of the labels given; others follow as they appear, `all` is last."""
    ranks = pd.DataFrame(index=table.index)
    for column, labels in (("task", tasks), ("method", methods)):
        known = [label for label in dict.fromkeys([*labels, *table[column]]) if (column, label) != ("task", ALL)]
        ranks[column] = table[column].map({label: rank for rank, label in enumerate([*known, ALL])})
    return table.loc[ranks.sort_values(["task", "method"], kind="stable").index].reset_index(drop=True)


def _mean(values: pd.Series[float]) -> float:
    return float(values.astype("Float64").to_numpy(dtype=float, na_value=np.nan).mean())


def _geometric_mean(values: pd.Series[float]) -> float:
    return float(np.exp(np.log(values.to_numpy(dtype=float)).mean()))
