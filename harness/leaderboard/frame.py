"""All answers of a board, each beside full attention's to the same sample of the same run."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from harness.leaderboard.entries import Entry, version
from harness.leaderboard.kinds import kind, suite
from harness.statistics.paired import REFERENCE, cards
from harness.statistics.together import together

TIMES = ("ttft", "tpot", "e2e")
_BYTES = ["kv_bytes", "extra_bytes"]
_KEY = ["task", "sample"]


def paired(entries: Sequence[Entry]) -> pd.DataFrame:
    """One row an answer.

    Returns:
        Columns: `entry`, `label`, `entrant`, `method`, `budget` (NaN where none was met), `task`, `cell` (task and the
        version of its code), `kind`, `suite`, `length`, `sample`, `unit` (its context, or itself), `score`, `diff`
        (score less full attention's), `ttft`, `tpot`, `e2e` (logs of full attention's time over this one's), `kv` (log
        of bytes of keys, values and the method's own likewise), `reads` (of bytes that a decode step reads), `kept`
        (share of tokens), `timed` and `full_timed` (which requests were timed together). NaN where either was not
        measured, of times also where that was on two cards, or at two times (`harness.statistics.paired.cards`). An
        answer that several runs have to a sample counts once.
    """
    frames = [_of_run(entry) for entry in entries]
    found = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
    return found.drop_duplicates(["entrant", "budget", "cell", "sample"], ignore_index=True)


def _of_run(entry: Entry) -> pd.DataFrame:
    records = entry.run.contenders
    records = records.assign(timed=[f"{entry.name} {number}" for number in together(records)])
    full = records[records["method"] == REFERENCE].drop_duplicates(_KEY).set_index(_KEY)
    own = records[records["method"] != REFERENCE]
    beside = full.reindex(pd.MultiIndex.from_frame(own[_KEY]))
    labels = own["method"].astype(str)
    frame = pd.DataFrame(
        {
            "entry": entry.name,
            "label": labels,
            "entrant": [entry.names.get(label, label) for label in labels],
            "method": [label.partition(":")[0] for label in labels],
            "budget": [math.nan if label in entry.unmatched else entry.budget for label in labels],
            "task": own["task"],
            "cell": [f"{task}@{version(entry, task)}" for task in own["task"]],
            "kind": [kind(task) for task in own["task"]],
            "suite": [suite(task) for task in own["task"]],
            "length": own["length"],
            "sample": own["sample"].astype(str),
            "unit": [_unit(extra, sample) for extra, sample in zip(own["extra"], own["sample"], strict=True)],
            "score": own["score"].astype(float),
            "diff": own["score"].to_numpy(float) - beside["score"].to_numpy(float),
            "kept": own["kept_fraction"].astype(float),
        }
    )
    frame["timed"], frame["full_timed"] = own["timed"], beside["timed"].to_numpy()
    same_card = np.array(cards(own)) == np.array(cards(beside))
    for name in TIMES:
        frame[name] = np.where(same_card, _log_ratio(beside[f"{name}_s"], own[f"{name}_s"]), np.nan)
    frame["kv"] = _log_ratio(_bytes(beside), _bytes(own))
    frame["reads"] = _log_ratio(beside["decode_read_bytes"], own["decode_read_bytes"])
    return frame


def _bytes(records: pd.DataFrame) -> pd.Series:
    numbers = records[_BYTES].astype("Float64").astype(float)
    return numbers["kv_bytes"] + numbers["extra_bytes"].fillna(0.0)


def _log_ratio(mine: pd.Series, theirs: pd.Series) -> NDArray[np.float64]:
    above, below = (side.to_numpy(dtype=float, na_value=np.nan) for side in (mine, theirs))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log(above) - np.log(below)
    return np.where(np.isfinite(ratio), ratio, np.nan)


def _unit(extra: object, sample: object) -> str:
    context = extra.get("context_hash") if isinstance(extra, dict) else None
    return f"context {context}" if context is not None else f"sample {sample}"
