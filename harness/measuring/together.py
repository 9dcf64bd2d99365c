"""Clocks and memory around requests that are decoded together.

TTFT of a request is that of its own prefill, with nothing queued ahead of it: from its prompt's token ids on the device
to its first new token on the host. The time between tokens is that of the steps that all requests share. E2E is both
and nothing else: the prefills of other requests, which a server would interleave in one way or another, are left out.
Peak memory is the whole batch's, weights included. Its joules, all prefills and steps, are shared out equally.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from harness.engine.batch import Batch, Ended, Slot
from harness.engine.request import Request
from harness.engine.stopwatch import Stopwatch
from harness.measuring.clock import Measured, PeakMemory, synchronize
from harness.measuring.energy import UNCOUNTED, EnergyMeter
from harness.storage.spans import survivors


@dataclass(frozen=True)
class MeasuredBatch:
    """A batch with its clocks and its memory.

    Attributes:
        each: of each request what `harness.measuring.clock.measure` says of one alone; peak memory and the bytes that a
            decode step reads are the batch's, and joules an equal share of the batch's.
        step_s: seconds of each decode step.
        decoded: new tokens that the steps brought, those of complete answers not counted.
    """

    each: list[Measured]
    step_s: list[float]
    decoded: int

    @property
    def tokens_per_s(self) -> float | None:
        """New tokens a second while decoding; None where every answer was a single token."""
        return self.decoded / sum(self.step_s) if self.step_s else None


class _Prefill(NamedTuple):
    """What is known of a request once its first token is there."""

    slot: Slot
    ttft_s: float
    kept: Sequence[float]
    survivors: dict[str, Any]
    decode_bytes: int
    parts_s: dict[str, float] | None


class _Whole(NamedTuple):
    """What is known of the batch, see `Measured`."""

    decode_bytes: int
    bus_bytes: float | None
    peak: int | None
    overlap: dict[str, float] | None


def measure_batch(
    batch: Batch,
    requests: Sequence[Request],
    ended: Sequence[Ended | None],
    stopwatch: Stopwatch | None = None,
    meter: EnergyMeter = UNCOUNTED,
) -> MeasuredBatch:
    """Runs requests together and times them; keys and values stay until the batch ends.

    Args:
        batch: that runs them.
        requests: what is asked, on the model's device.
        ended: of each request, see `Slot`.
        stopwatch: of the engine, where the parts of each TTFT are to be timed, which costs a little.
        meter: of the device's energy; read before the first prefill and behind the last step.
    """
    device = requests[0].prompt.device
    batch.end()
    peak, reading = PeakMemory(device), meter.read()
    found = _prefills(batch, requests, ended, stopwatch)
    gaps: dict[Slot, list[float]] = {one.slot: [] for one in found}
    step_s = []
    synchronize(device)
    before = time.perf_counter()
    for slots in batch.steps():
        step_s.append((now := time.perf_counter()) - before)
        for slot in slots:
            gaps[slot].append(step_s[-1])
        before = now
    joules = meter.spent(reading, sum(one.ttft_s for one in found) + sum(step_s))
    share = None if joules is None else joules / len(found)
    read, highest, bus = sum(one.decode_bytes for one in found), peak.read(), None
    if step_s:
        bus = sum(one.slot.method.bus_bytes() for one in found) / len(step_s)
    whole = _Whole(read, bus, highest, batch.overlap())
    each = [_measured(one, gaps[one.slot], whole, share) for one in found]
    return MeasuredBatch(each, step_s, sum(map(len, gaps.values())))


def _measured(one: _Prefill, gaps: list[float], whole: _Whole, joules: float | None) -> Measured:
    return Measured(
        tokens=one.slot.tokens,
        ttft_s=one.ttft_s,
        e2e_s=one.ttft_s + sum(gaps),
        token_s=gaps,
        peak_memory_bytes=whole.peak,
        kept=one.kept,
        survivors=one.survivors,
        work=one.slot.work,
        decode_bytes=whole.decode_bytes,
        parts_s=one.parts_s,
        overlap=whole.overlap,
        energy_j=joules,
        bus_bytes=whole.bus_bytes,
    )


def _prefills(
    batch: Batch, requests: Sequence[Request], ended: Sequence[Ended | None], stopwatch: Stopwatch | None
) -> list[_Prefill]:
    device, slots, found = requests[0].prompt.device, batch.read(requests, ended), []
    for _ in requests:
        synchronize(device)
        start = time.perf_counter()
        if stopwatch is not None:
            stopwatch.start(device)
        slot = next(slots)
        ttft = time.perf_counter() - start
        parts_s = stopwatch.stop() if stopwatch is not None else None
        found.append(_prefilled(slot, ttft, parts_s))
    return found


def _prefilled(slot: Slot, ttft: float, parts_s: dict[str, float] | None) -> _Prefill:
    method = slot.method
    which = survivors([cache.kept_positions() for cache in method.cache], method.prompt_len)
    return _Prefill(slot, ttft, method.tokens_kept(), which, method.decode_bytes(), parts_s)
