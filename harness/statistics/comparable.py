"""Which times of a record say something beside those of another one."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from harness.statistics.turns import of_prefills

_SHARED = ["tpot_s", "tpot_mean_s", "token_s", "e2e_s"]
_EQUAL = ["energy_j", "energy_per_token_j"]


def arrived(records: pd.DataFrame) -> pd.Series[bool]:
    """Which records are of requests that arrived at a rate."""
    if "arrival" not in records:
        return pd.Series(False, records.index)
    return records["arrival"].map(lambda one: isinstance(one, dict)).astype(bool)


def comparable(records: pd.DataFrame) -> pd.DataFrame:
    """The records, in which times count as not measured that are of another thing than one request.

    Those of later turns (`of_prefills`), and what lies between the tokens of requests that arrived at a rate: one load
    of so many requests that wait for each other is one measurement, and not so many pairs. Nor are the equal shares of
    what all requests of a load, or of a batch, took in joules.

    Args:
        records: one row a record (`harness.storage.store.load`).
    """
    records = of_prefills(records)
    loaded = arrived(records)
    together = loaded | records["batch"].notna() if "batch" in records else loaded
    records = _without(records, _SHARED, loaded)
    return _without(records, _EQUAL, together)


def _without(records: pd.DataFrame, names: Sequence[str], where: pd.Series[bool]) -> pd.DataFrame:
    if not where.any():
        return records
    return records.assign(**{name: records[name].mask(where) for name in names if name in records})
