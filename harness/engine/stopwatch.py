"""Where the time of a prefill goes: project, score, select, gather, attention, feed forward.

Off by default: then `part` costs one comparison. Running, every border between parts is marked, by a device event on
CUDA and by the clock elsewhere, and the time between two borders belongs to the innermost part that is open.
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


class Stopwatch:
    """Times the parts of whatever runs between `start` and `stop`."""

    def __init__(self) -> None:
        """Stands still."""
        self._running = self._on_cuda = False
        self._open: list[str] = []
        self._marks: list[tuple[str, Any]] = []

    @property
    def running(self) -> bool:
        """Whether parts are timed now."""
        return self._running

    def part(self, name: str) -> AbstractContextManager[None]:
        """Work inside is part `name`; nested parts are taken out of the outer one."""
        return self._inside(name) if self._running else _NOTHING

    def start(self, device: torch.device) -> None:
        """Begins to time work on `device`."""
        self._running, self._on_cuda = True, device.type == "cuda"
        self._open, self._marks = [OTHER], []
        self._mark()

    def stop(self) -> dict[str, float]:
        """Seconds of each part since `start`; waits for the device."""
        self._running = False
        self._mark()
        if self._on_cuda:
            torch.cuda.synchronize()
        seconds: defaultdict[str, float] = defaultdict(float)
        for (name, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            seconds[name] += begin.elapsed_time(end) / 1000 if self._on_cuda else end - begin
        return dict(seconds)

    @contextmanager
    def _inside(self, name: str) -> Iterator[None]:
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
