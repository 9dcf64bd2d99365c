"""Where the time of a prefill goes: project, score, select, gather, attention, feed forward.

Off by default: then `part` costs one comparison. Switched on, every border between parts is marked, by a device event
on CUDA and by the clock elsewhere, and the time between two borders belongs to the innermost part that is open.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

OTHER = "other"

_NOTHING: AbstractContextManager[None] = nullcontext()
_active: Parts | None = None


def part(name: str) -> AbstractContextManager[None]:
    """Marks a piece of work as part `name`; nested parts are taken out of the outer one."""
    return _NOTHING if _active is None else _active.inside(name)


class Parts:
    """Times the parts of whatever runs between `start` and `stop`."""

    def __init__(self, device: torch.device) -> None:
        """Parts of work on `device`."""
        self._on_cuda = device.type == "cuda"
        self._open: list[str] = [OTHER]
        self._marks: list[tuple[str, Any]] = []

    def start(self) -> None:
        """From now on `part` marks this object's borders; there can be one at a time."""
        global _active
        _active = self
        self._mark()

    def stop(self) -> dict[str, float]:
        """Seconds of each part since `start`; waits for the device."""
        global _active
        _active = None
        self._mark()
        if self._on_cuda:
            torch.cuda.synchronize()
        seconds: defaultdict[str, float] = defaultdict(float)
        for (name, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            seconds[name] += begin.elapsed_time(end) / 1000 if self._on_cuda else end - begin
        return dict(seconds)

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """Opens a part; see `part`."""
        self._open.append(name)
        self._mark()
        try:
            yield
        finally:
            self._open.pop()
            self._mark()

    def _mark(self) -> None:
        self._marks.append((self._open[-1], self._now()))

    def _now(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event
