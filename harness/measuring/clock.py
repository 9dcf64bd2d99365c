"""Clocks and memory around one request.

TTFT starts when the prompt's token ids are on the device and ends when the first new token id is on the host; E2E ends
with the last one. The device is synchronised at both ends: before the first clock reading by a full synchronisation, at
each token by reading its id.
"""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from harness.engine import promises
from harness.engine.engine import Engine
from harness.engine.generation import Generation, Work
from harness.engine.method import Method
from harness.engine.request import Request
from harness.engine.session import Session
from harness.measuring.energy import UNCOUNTED, EnergyMeter, Reading
from harness.storage.spans import survivors

Ended = Callable[[Sequence[int]], bool]


@dataclass(frozen=True)
class Measured:
    """One generation with its clocks and its memory.

    Attributes:
        tokens: generated ids, the stop token included.
        ttft_s, e2e_s: seconds, as defined above.
        token_s: seconds between consecutive new tokens.
        peak_memory_bytes: see `PeakMemory`.
        kept: prompt tokens a layer whose keys and values were there after the prefill.
        survivors: which tokens those were, as `harness.storage.spans.survivors` says it.
        work: rows a layer that the prefill computed.
        decode_bytes: bytes of keys, values and method data that a decode step reads, after the first token.
        parts_s: seconds of each part of TTFT, if they were asked for.
        overlap: how much of the work beside a decode step was hidden, see `Overlap.read`; None where nothing was.
        energy_j: joules by the device's counter (`harness.measuring.energy`), None where it cannot tell.
        bus_bytes: bytes that a decode step brought over the host link, mean of the steps; None where there were none.
    """

    tokens: list[int]
    ttft_s: float
    e2e_s: float
    token_s: list[float]
    peak_memory_bytes: int | None
    kept: Sequence[float]
    survivors: dict[str, Any]
    work: Work
    decode_bytes: int
    parts_s: dict[str, float] | None
    overlap: dict[str, float] | None
    energy_j: float | None = None
    bus_bytes: float | None = None

    @property
    def tpot_s(self) -> float | None:
        """Median seconds per token after the first; None where there is only one."""
        return statistics.median(self.token_s) if self.token_s else None

    @property
    def cold(self) -> bool:
        """Something was recorded first: parts of the prefill once a length, decode steps once for memory of a size."""
        return bool(self.work.captures) or (self.work.recorded is not None and self.work.recorded.anew)


def measure(
    engine: Engine,
    method: Method,
    request: Request,
    *,
    parts: bool = False,
    ended: Ended | None = None,
    meter: EnergyMeter = UNCOUNTED,
    session: Session | None = None,
) -> Measured:
    """Runs one request and times it.

    One that is `cold` is asked again, for that is not what the request takes. Later turns of a session, which cannot
    begin again, stand as they are.

    Args:
        engine: on the model.
        method: is asked.
        request: what it is asked.
        parts: also time the parts of TTFT, which costs a little.
        ended: whether the answer is complete, by the tokens that there are; asked behind each.
        meter: of the device's energy; read before the first clock and behind the last.
        session: of the engine and the method, where the request is one of several over the same cache.
    """
    measured = _timed(engine, method, request, parts, ended, meter, session)
    if not measured.cold or (session is not None and session.later):
        return measured
    if session is not None:
        session.forget()
    return _timed(engine, method, request, parts, ended, meter, session)


def _timed(
    engine: Engine,
    method: Method,
    request: Request,
    parts: bool,
    ended: Ended | None,
    meter: EnergyMeter,
    session: Session | None,
) -> Measured:
    begun = _begin(engine, method, request, parts, meter, session)
    stream, tokens, clocks = begun.stream, [begun.token], [begun.first]
    # What the method did in its prefill is read between two tokens, with the clock stopped.
    parts_s = engine.context.stopwatch.stop() if parts else None
    kept, work, decode_bytes, bus = method.tokens_kept(), stream.work, method.decode_bytes(), _bus_bytes(method)
    held = engine.context.ranks.every_head([cache.kept_positions() for cache in method.cache])
    which = survivors(held, method.prompt_len)
    pause = time.perf_counter() - clocks[0]
    while not (ended and ended(tokens)) and (token := next(stream, None)) is not None:
        tokens.append(token)
        clocks.append(time.perf_counter() - pause)
    gaps = [after - before for before, after in pairwise(clocks)]
    engine.context.ranks.agree(tokens)
    ttft, e2e, peak = clocks[0] - begun.start, clocks[-1] - begun.start, begun.peak.read(work)
    joules, overlap = meter.spent(begun.meter, e2e), stream.overlap()
    each = (_bus_bytes(method) - bus) / len(gaps) if gaps else None
    return Measured(tokens, ttft, e2e, gaps, peak, kept, which, work, decode_bytes, parts_s, overlap, joules, each)


def _bus_bytes(method: Method) -> int:
    return promises.count("bus_bytes", method.bus_bytes())


@dataclass(frozen=True)
class _Begun:
    """A generation behind its first token; the clock before and behind that, and the meter before."""

    stream: Generation
    peak: PeakMemory
    start: float
    token: int
    first: float
    meter: Reading


def _begin(
    engine: Engine, method: Method, request: Request, parts: bool, meter: EnergyMeter, session: Session | None
) -> _Begun:
    device = request.prompt.device
    peak = PeakMemory(device)
    synchronize(device)
    engine.context.ranks.barrier()
    reading = meter.read()
    start = time.perf_counter()
    if parts:
        engine.context.stopwatch.start(device)
    stream = engine.stream(method, request) if session is None else session.stream(request)
    return _Begun(stream, peak, start, next(stream), time.perf_counter(), reading)


def synchronize(device: torch.device) -> None:
    """Waits until the device has done everything it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PeakMemory:
    """Highest memory from its creation to `read`.

    On CUDA the allocator's peak, and what recordings of the prefill hold, which it counts as free. On Linux the
    process's highest resident set (VmHWM, reset through clear_refs), code and libraries included. The reset can only go
    down to what is resident, so freed memory that the C library still holds goes back to the system first; otherwise
    every request would inherit the peak of those before it. Elsewhere nothing is claimed.
    """

    def __init__(self, device: torch.device) -> None:
        """Starts watching `device`, or the process where the device is the CPU."""
        self._device = device
        self._can = device.type == "cuda" or _reset_high_water()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def read(self, work: Work | None = None) -> int | None:
        """Bytes, or None where the platform cannot tell.

        Args:
            work: of the request.
        """
        if not self._can:
            return None
        if self._device.type == "cuda":
            recorded = work.prefill.nbytes if work is not None and work.prefill is not None else 0
            return torch.cuda.max_memory_allocated(self._device) + recorded
        return next(_high_water(), None)


def _reset_high_water() -> bool:
    if not sys.platform.startswith("linux"):
        return False
    _give_back_freed_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _give_back_freed_memory() -> None:
    # glibc has it, other C libraries keep less.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _high_water() -> Iterator[int]:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            yield int(line.split()[1]) * 1024
