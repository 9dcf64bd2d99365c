"""From records to one row for each method and task: what `summary.csv` holds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from harness.statistics.comparable import comparable
from harness.statistics.paired import ALL, REFERENCE, speedups
from harness.statistics.percentiles import PERCENTS, percentile, pooled
from harness.statistics.together import together

BASELINE = REFERENCE
TTFT_TAILS = [f"ttft_p{percent}_s" for percent in PERCENTS]
ITL_TAILS = [f"itl_p{percent}_s" for percent in PERCENTS]
COLUMNS = [
    *("method", "task", "n", "score", "ttft_s", "ttft_speedup", "tpot_s", "e2e_s", "e2e_speedup"),
    *("peak_memory_bytes", "kv_bytes", "kept_fraction"),
    *("tpot_mean_s", "energy_n", "energy_j", "energy_per_token_j", "energy_ratio"),
    *("ttft_n", *TTFT_TAILS, "itl_n", *ITL_TAILS),
]

_DECIMALS = {"score": 2, "kept_fraction": 4, "energy_j": 3, "energy_per_token_j": 4}
_DECIMALS |= dict.fromkeys(("ttft_speedup", "e2e_speedup", "energy_ratio"), 4)
_DECIMALS |= dict.fromkeys(("ttft_s", "tpot_s", "tpot_mean_s", "e2e_s", *TTFT_TAILS, *ITL_TAILS), 6)
_COSTS = ["ttft_s", "tpot_s", "tpot_mean_s", "e2e_s", "energy_j", "energy_per_token_j"]
_BYTES = ["peak_memory_bytes", "kv_bytes"]
_RATIOS = ["ttft_speedup", "e2e_speedup", "energy_ratio"]
_WHOLE = [name for name in COLUMNS[3:] if not name.endswith("_n") and name not in (*TTFT_TAILS, *ITL_TAILS)]


def summarise(records: pd.DataFrame, methods: Sequence[str] = (), tasks: Sequence[str] = ()) -> pd.DataFrame:
    """Sums up records (`harness.storage.store.load`), task by task, so that the methods of a task stand together.

    Args:
        records: one row a record.
        methods: labels in the order to list them in; others follow as they appear.
        tasks: likewise.

    Returns:
        `COLUMNS`: `n` answered requests, mean `score` in percent, medians of seconds, joules and bytes, mean
        `kept_fraction`. A speed-up (`energy_ratio` likewise) is the baseline's time divided by the method's on the same
        sample, averaged over samples as `harness.statistics.paired.compare` does it. `tpot_mean_s` is the median of the
        requests' means. Percentiles are over `ttft_n` requests, and over the `itl_n` gaps between tokens (inter-token
        latency) of all requests together, a batch's once; NaN of too few (`harness.statistics.percentiles`). Times that
        compare with no other (`harness.statistics.comparable`) count in nothing. What was not measured, and ratios in a
        run without the baseline, is NaN or NA.
    """
    records = comparable(records)
    groups = records.groupby(["method", "task"], sort=False)
    table = groups[[*_COSTS, *_BYTES]].median()
    ratios = speedups(records)[["ttft", "e2e", "energy"]]
    table[_RATIOS] = ratios.reindex(table.index).to_numpy()
    table["energy_n"] = groups["energy_j"].count()
    table = table.join(_tails(records))
    table["n"] = groups["kept_fraction"].count()  # which a request without an answer lacks
    table["score"] = groups["score"].mean() * 100
    table["kept_fraction"] = groups["kept_fraction"].mean()
    table[_BYTES] = table[_BYTES].astype("Float64").round().astype("Int64")
    return ordered(table.reset_index(), methods, tasks)[COLUMNS].round(_DECIMALS)


def overall(summary: pd.DataFrame) -> pd.DataFrame:
    """One row a method over the tasks that every method has records of, so that no method gets the easier ones.

    Returns:
        The columns of `summary` with `tasks` (how many) for `task` and `n`: mean score and kept fraction, geometric
        means of seconds, joules and ratios, largest peak memory, mean bytes of keys and values. What one of the tasks
        does not have, the whole does not have; percentiles are of one task alone.
    """
    groups = shared(summary).groupby("method", sort=False)
    table = groups[["score", "kept_fraction"]].agg(_mean)
    table[[*_COSTS, *_RATIOS]] = groups[[*_COSTS, *_RATIOS]].agg(_geometric_mean)
    table["peak_memory_bytes"] = groups["peak_memory_bytes"].agg(lambda values: values.max(skipna=False))
    table["kv_bytes"] = groups["kv_bytes"].agg(_mean).astype("Float64").round().astype("Int64")
    table.insert(0, "tasks", groups.size())
    return table.reset_index()[["method", "tasks", *_WHOLE]]


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


def _tails(records: pd.DataFrame) -> pd.DataFrame:
    """Percentiles of TTFT and of the gaps between tokens, and how many there are of each."""
    rows = {
        key: _percentiles("ttft", list(group["ttft_s"])) | _percentiles("itl", _gaps(group))
        for key, group in records.groupby(["method", "task"], sort=False)
    }
    columns = ["ttft_n", *TTFT_TAILS, "itl_n", *ITL_TAILS]
    index = pd.MultiIndex.from_arrays([[m for m, _ in rows], [t for _, t in rows]], names=["method", "task"])
    return pd.DataFrame(list(rows.values()), index=index, columns=columns)


def _gaps(records: pd.DataFrame) -> list[float]:
    return pooled(list(records["token_s"]), together(records).tolist())


def _percentiles(name: str, values: Sequence[float]) -> dict[str, float]:
    counted = {f"{name}_n": int(np.isfinite(values).sum())}
    return counted | {f"{name}_p{percent}_s": percentile(values, percent) for percent in PERCENTS}


def _mean(values: pd.Series[float]) -> float:
    return float(values.astype("Float64").to_numpy(dtype=float, na_value=np.nan).mean())


def _geometric_mean(values: pd.Series[float]) -> float:
    return float(np.exp(np.log(values.to_numpy(dtype=float)).mean()))
