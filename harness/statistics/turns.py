"""Records of conversations: which turn each is of, and which of them prefilled nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

_OF_PREFILL = ["ttft_s", "e2e_s", "energy_j"]


def turn(extra: Mapping[str, Any]) -> int | None:
    """The number of the question in its conversation, from 1; None where a record is of no conversation."""
    number = extra.get("turn")
    return number if isinstance(number, int) and isinstance(extra.get("turns"), int) else None


def later(extra: Mapping[str, Any]) -> bool:
    """Whether a question came in over the cache of the turns before; one that was asked apart had a prefill."""
    return (turn(extra) or 1) > 1 and not extra.get("apart")


def of_prefills(records: pd.DataFrame) -> pd.DataFrame:
    """The records, in which TTFT, E2E and energy of later turns count as not measured: those are of another thing.

    Args:
        records: one row a record (`harness.storage.store.load`).
    """
    if "extra" not in records:
        return records
    behind = np.array([isinstance(extra, dict) and later(extra) for extra in records["extra"]], dtype=bool)
    if not behind.any():
        return records
    return records.assign(**{name: records[name].mask(behind) for name in _OF_PREFILL if name in records})
