"""What a request costs, as the gates compare it: times, joules, and the slow ones among its gaps between tokens."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import pandas as pd

from harness.statistics.paired import COSTS
from harness.statistics.percentiles import percentile

TAILS = {"itl_p90": 90, "itl_p99": 99}
"""Percentiles of one request's gaps, which its pair has too; those over requests have no pairs."""


def costs_of(row: Mapping[Hashable, Any]) -> dict[str, float]:
    """What is known and above 0 of `COSTS` and `TAILS`, of one record; a short answer has no percentiles."""
    found = {name: row.get(column) for name, column in COSTS.items()}
    gaps = row.get("token_s")
    if isinstance(gaps, Sequence):
        found |= {name: percentile(gaps, percent) for name, percent in TAILS.items()}
    return {name: float(value) for name, value in found.items() if not pd.isna(value) and value > 0}
