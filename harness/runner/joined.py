"""One record of a request, from those that every rank has made of its part of the model.

Times and the answer are the first rank's, which all others wait for in every layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from harness.storage.record import OUT_OF_MEMORY, Record

SUMMED = (
    "energy_j", "peak_memory_bytes", "kv_bytes", "kv_bytes_host", "extra_bytes", "prefill_flops", "dense_flops",
    "decode_read_bytes", "decode_bus_bytes",
)  # fmt: skip
"""Fields of which each rank has its part; the whole is null where one does not know its own."""
SLOWEST = ("prefill_floor_s", "prefill_lasting_floor_s", "decode_floor_s", "decode_bus_floor_s")
"""Fields of what a rank's part of the work takes at best, on its device: all of it takes as long as the longest."""


def joined(records: Sequence[Record], workers: Sequence[dict[str, Any]]) -> Record:
    """The record of the whole model.

    Args:
        records: of the same request, rank by rank.
        workers: `harness.measuring.provenance.worker` of each.
    """
    first = records[0]
    cards = [card for each in workers if (card := each["gpu_uuid"]) is not None]
    who = {"ranks": len(workers)} | ({"gpu_uuid": ",".join(cards)} if cards else {})
    if first.failed or OUT_OF_MEMORY in first.extra:
        return first.model_copy(update={"worker": who})
    return first.model_copy(
        update={
            **{name: _sum([getattr(record, name) for record in records]) for name in SUMMED},
            **{name: _max([getattr(record, name) for record in records]) for name in SLOWEST},
            "tokens_kept": [_mean(kept) for kept in zip(*(record.tokens_kept for record in records), strict=True)],
            "tokens_requested": [
                math.ceil(_mean(asked)) for asked in zip(*(record.tokens_requested for record in records), strict=True)
            ],
            "worker": who,
        }
    )


def _sum(values: Sequence[Any]) -> Any:
    return None if None in values else sum(values)


def _max(values: Sequence[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _mean(values: Sequence[float]) -> float | int:
    mean = sum(values) / len(values)
    return int(mean) if mean.is_integer() else mean
