"""Which times of a record say something beside those of another one."""

from __future__ import annotations

import pandas as pd

from harness.statistics.turns import of_prefills

_OF_LOAD = ["tpot_s", "tpot_mean_s", "token_s", "e2e_s", "energy_j", "energy_per_token_j"]


def arrived(records: pd.DataFrame) -> pd.Series[bool]:
    """Which records are of requests that arrived at a rate."""
    if "arrival" not in records:
        return pd.Series(False, records.index)
    return records["arrival"].map(lambda one: isinstance(one, dict)).astype(bool)


def comparable(records: pd.DataFrame) -> pd.DataFrame:
    """The records, in which times count as not measured that are of another thing than requests that were sent.

    Those of later turns (`of_prefills`), and what lies between the tokens of requests that arrived at a rate: that
    depends on who else came, and so do the joules.

    Args:
        records: one row a record (`harness.storage.store.load`).
    """
    records, loaded = of_prefills(records), arrived(records)
    if not loaded.any():
        return records
    return records.assign(**{name: records[name].mask(loaded) for name in _OF_LOAD if name in records})
