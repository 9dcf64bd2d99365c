"""Requests that arrive over time: who waits, who is served, and when, on a clock that may be anybody's.

First come, first served. Between two decode steps all who have arrived are prefilled, whole and one after the other, as
long as there are places; who is done leaves at once. The clock stands still while what was measured is noted, and runs
through everything else: prefills, steps, and the changes between them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

from harness.engine.batch import Ended, Slot
from harness.engine.continuous import Continuous
from harness.engine.request import Request
from harness.measuring.clock import Measured, PeakMemory
from harness.measuring.energy import UNCOUNTED, EnergyMeter
from harness.storage.spans import survivors


class Clock(Protocol):
    """Tells the seconds since a load began."""

    def now(self) -> float:
        """Seconds."""

    def wait(self, until: float) -> None:
        """Nothing is to be done before."""

    def stopped(self) -> AbstractContextManager[None]:
        """It stands still inside."""


class WallClock:
    """The time that passes from its creation on."""

    def __init__(self) -> None:
        """At 0."""
        self._zero = time.perf_counter()

    def now(self) -> float:
        """As `Clock`."""
        return time.perf_counter() - self._zero

    def wait(self, until: float) -> None:
        """As `Clock`."""
        while (left := until - self.now()) > 0:
            time.sleep(left)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """As `Clock`."""
        begin = time.perf_counter()
        yield
        self._zero += time.perf_counter() - begin


class Arriving(NamedTuple):
    """A request that is to come.

    Attributes:
        second: when.
        request: what it asks, on the model's device.
        ended: see `Slot`.
    """

    second: float
    request: Request
    ended: Ended | None = None


@dataclass
class Visit:
    """A request that is served.

    Attributes:
        number: of the request, in the order of arrivals.
        slot: its place in the batch.
        arrived, start: seconds at which it came and at which its prefill began.
        kept, survivors, decode_bytes: see `Measured`.
        tokens: second of each of its new tokens.
        sizes: requests in each of its decode steps.
        replayed: whether all of these were replayed.
    """

    number: int
    slot: Slot
    arrived: float
    start: float
    kept: Sequence[float]
    survivors: dict[str, Any]
    decode_bytes: int
    tokens: list[float]
    sizes: list[int] = field(default_factory=list)
    replayed: bool = True

    def measured(self, peak: int | None) -> Measured:
        """What is known of it, from the start of its prefill on."""
        return Measured(
            tokens=self.slot.tokens,
            ttft_s=self.tokens[0] - self.start,
            e2e_s=self.tokens[-1] - self.start,
            token_s=[after - before for before, after in pairwise(self.tokens)],
            peak_memory_bytes=peak,
            kept=self.kept,
            survivors=self.survivors,
            work=self.slot.work,
            decode_bytes=self.decode_bytes,
            parts_s=None,
            overlap=None,
        )


Leaves = Callable[[Visit, Measured], None]
"""Is told of each request that is done, while its method still has its caches."""


def serve(
    batch: Continuous, coming: Sequence[Arriving], clock: Clock, leaves: Leaves, meter: EnergyMeter = UNCOUNTED
) -> float | None:
    """Serves requests until the last one is done.

    Args:
        batch: has as many places as requests may be served at once.
        coming: ascending, at least one.
        clock: at 0.
        leaves: notes what was measured, with the clock stopped.
        meter: of the device's energy.

    Returns:
        Joules of the whole load, the device's rest between requests included; None where it cannot tell.
    """
    reading, waiting, here = meter.read(), deque(enumerate(coming)), dict[Slot, Visit]()
    peak = PeakMemory(coming[0].request.prompt.device)
    while waiting or here:
        if waiting and batch.places and waiting[0][1].second <= clock.now():
            visit = _received(batch, *waiting.popleft(), clock)
            here[visit.slot] = visit
        elif here:
            _step(batch, here, clock)
        else:
            clock.wait(waiting[0][1].second)
        for slot in [slot for slot in here if slot.done]:
            visit = here.pop(slot)
            with clock.stopped():
                batch.settle(slot)
                leaves(visit, visit.measured(peak.read(slot.work)))
            batch.leave(slot)
    return meter.spent(reading, clock.now())


def _received(batch: Continuous, number: int, one: Arriving, clock: Clock) -> Visit:
    start = clock.now()
    slot = batch.join(one.request, one.ended)
    first = clock.now()
    with clock.stopped():
        method = slot.method
        which = survivors([cache.kept_positions() for cache in method.cache], method.prompt_len)
        kept, read = method.tokens_kept(), method.decode_bytes()
        return Visit(number, slot, one.second, start, kept, which, read, [first])


def _step(batch: Continuous, here: dict[Slot, Visit], clock: Clock) -> None:
    stepped = batch.step()
    now = clock.now()
    for slot in stepped:
        visit = here[slot]
        visit.tokens.append(now)
        visit.sizes.append(len(stepped))
        visit.replayed &= batch.replayed
