"""Joules of a request, from the counter that a GPU keeps of all the energy it ever used.

The counter moves in steps, of 10 to 100 ms by the device, so what it says is old by up to one step, at both ends.
Waiting for a step would let the device rest before every request, and a rested device is faster. So the counter is read
as it is, how long a step lasts is measured, and what lasts fewer than `STEPS` of them has no energy rather than a
guess. Adding up many short requests would not help: each lacks the last part of a step, and has one of the rest before.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

STEPS = 10
"""Steps of the counter that a request must last: its joules are off by a tenth at most, by a twentieth on average."""

_WATCH_S = 1.0
_POLL_S = 0.001
_FEWEST_STEPS = 3

Counter = Callable[[], float | None]
"""Joules since some moment; None where the device does not count."""


class Rest(NamedTuple):
    """A device that does nothing.

    Attributes:
        power_w: mean watts.
        step_s: seconds from one step of its counter to the next, median.
    """

    power_w: float
    step_s: float


class Reading(NamedTuple):
    """What the counter said, and when, in seconds of `time.perf_counter`."""

    joules: float | None
    at: float


def watch_rest(counter: Counter, seconds: float = _WATCH_S) -> Rest | None:
    """Looks at the counter for a while, in which the device must have nothing to do; None where it does not move."""
    steps = list(_steps(counter, seconds))
    if len(steps) < _FEWEST_STEPS:
        return None
    (begin, first), (end, last) = steps[0], steps[-1]
    lasted = [after - before for (before, _), (after, _) in pairwise(steps)]
    return Rest((last - first) / (end - begin), statistics.median(lasted))


def _steps(counter: Counter, seconds: float) -> Iterator[tuple[float, float]]:
    """When the counter moved, and to what."""
    known, until = counter(), time.perf_counter() + seconds
    while known is not None and (now := time.perf_counter()) < until:
        joules = counter()
        if joules is not None and joules != known:
            known = joules
            yield now, joules
        time.sleep(_POLL_S)


class EnergyMeter:
    """One device's counter, read before and behind requests, never inside of one.

    Attributes:
        rest: the device at rest; None where it does not count, and then nothing has an energy.
    """

    def __init__(self, counter: Counter) -> None:
        """Watches the device for a second; it must have nothing to do."""
        self._counter = counter
        self.rest = watch_rest(counter)

    def read(self) -> Reading:
        """The counter now."""
        return Reading(self._counter(), time.perf_counter())

    def spent(self, start: Reading, busy_s: float) -> float | None:
        """Joules of a request: what the counter moved by, without rest for the time that was not the request's.

        Args:
            start: read before the request.
            busy_s: seconds that the request took.

        Returns:
            None where the device does not count, or the request was too short to tell (`STEPS`); never 0.
        """
        if self.rest is None or busy_s < STEPS * self.rest.step_s:
            return None
        end = self.read()
        if start.joules is None or end.joules is None:
            return None
        beside_s = max(0.0, end.at - start.at - busy_s)
        joules = end.joules - start.joules - self.rest.power_w * beside_s
        return joules if joules > 0 else None

    def facts(self) -> dict[str, float | None]:
        """`idle_power_w` and `energy_step_s` of a record's `device_state`."""
        power, step = self.rest or (None, None)
        return {"idle_power_w": power, "energy_step_s": step}


UNCOUNTED = EnergyMeter(lambda: None)
"""Of a device that does not count."""
