"""Requests that arrived at a rate, as a client sees them: seconds from their arrival on."""

from __future__ import annotations

import math

import pandas as pd

from harness.statistics.comparable import arrived

_FIELDS = [
    "rate", "most", "arrival_s", "start_s", "first_token_s", "last_token_s", "batch_sizes", "replayed", "captures",
]  # fmt: skip


def requests(records: pd.DataFrame) -> pd.DataFrame:
    """Of the records those that arrived at a rate.

    Returns:
        Their `method`, `task`, `sample`, `new_tokens` and `energy_j`; what `harness.storage.record.Arrival` says of
        each, `rate` infinite where all arrived at once; and in seconds `queue_s`, `ttft_s` and `e2e_s` from arrival,
        `service_ttft_s` from the start of its prefill, and `tpot_s`, vLLM's mean, NaN of a single token.
    """
    own = records[arrived(records)]
    found = pd.DataFrame(list(own["arrival"]) if len(own) else [], index=own.index, columns=_FIELDS)
    found = own[["method", "task", "sample", "new_tokens"]].join(found)
    joules = own["own_energy_j" if "own_energy_j" in own else "energy_j"]
    more = (found["new_tokens"] - 1).where(found["new_tokens"] > 1).astype(float)
    return found.assign(
        energy_j=pd.to_numeric(joules, errors="coerce").astype(float),
        rate=found["rate"].astype(float).fillna(math.inf),
        queue_s=found["start_s"] - found["arrival_s"],
        ttft_s=found["first_token_s"] - found["arrival_s"],
        service_ttft_s=found["first_token_s"] - found["start_s"],
        tpot_s=(found["last_token_s"] - found["first_token_s"]) / more,
        e2e_s=found["last_token_s"] - found["arrival_s"],
    )


def duration(group: pd.DataFrame) -> float:
    """Seconds of one load, from its first arrival to its last token."""
    return float(group["last_token_s"].max())
