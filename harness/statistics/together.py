"""Which requests were timed together, so that their times are one reading and not so many."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from harness.statistics.comparable import arrived


def together(records: pd.DataFrame) -> NDArray[np.int64]:
    """Numbers the batches, the loads, and the requests that were alone.

    Those of a batch share every decode step, and were prefilled one behind the other, with no other method between
    them. A batch is known by its tokens a second, which no other one has to the last digit, and, where it decoded
    nothing, by the order of its records. Those that arrived at a rate wait for each other: all of a task are one load.

    Args:
        records: one row a record (`harness.storage.store.load`).

    Returns:
        [n] numbers of their groups, in the order in which these come.
    """
    size, rate = batch_sizes(records), _column(records, "batch_tokens_per_s")
    batches = [records["method"], records["task"], size, rate]
    place = records.groupby(batches, dropna=False).cumcount()
    part = (place // size).mask(arrived(records), 0)
    groups = records.groupby([*batches, part], sort=False, dropna=False).ngroup()
    return np.asarray(groups, dtype=np.int64)


def batch_sizes(records: pd.DataFrame) -> pd.Series[float]:
    """Requests that were decoded together with each, itself included: 1 where it was alone."""
    return _column(records, "batch").fillna(1.0)


def _column(records: pd.DataFrame, name: str) -> pd.Series[float]:
    """As floats, NaN where records do not have it."""
    found = records[name] if name in records else pd.Series(np.nan, records.index)
    return found.astype("Float64").astype(float)
