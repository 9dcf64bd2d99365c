"""Work beside a decode step, and how much of it is hidden, by the device's own clock.

Marks on both streams are part of the recorded step, so every replay sets them anew: where work beside it begins and
ends, when the step itself is through, and when it may go on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


class Overlap:
    """The marks of one step that has work beside it."""

    def __init__(self, side: Any) -> None:
        """
        Args:
            side: the CUDA stream beside the current one.
        """
        self._side = side
        self._spans: list[tuple[Any, Any]] = []
        self._wait: tuple[Any, Any] | None = None

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Work inside runs on the side stream, behind all that the current one was given so far."""
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            begin = _mark()
            yield
            self._spans.append((begin, _mark()))

    def join(self) -> None:
        """The current stream waits for the work beside it."""
        begin = _mark()
        torch.cuda.current_stream().wait_stream(self._side)
        self._wait = begin, _mark()

    def read(self) -> dict[str, float]:
        """Of the last time that the step ran: seconds of work beside it, of waiting for that, and the share hidden."""
        assert self._wait is not None
        torch.cuda.synchronize()
        beside = sum(_seconds(*span) for span in self._spans)
        waited = _seconds(*self._wait)
        return {"beside_s": beside, "waited_s": waited, "hidden": max(0.0, 1 - waited / beside)}


class SideStream:
    """Runs pieces of a step beside the rest of it; on a CPU, where they stand."""

    def __init__(self) -> None:
        self._stream: Any = None
        self._overlap: Overlap | None = None

    def beside(self, *inputs: Tensor) -> AbstractContextManager[Any]:
        """Work inside runs beside the rest of the step, up to `join`.

        Args:
            inputs: what it reads that may be freed meanwhile; at least one.
        """
        if not inputs[0].is_cuda:
            return nullcontext()
        cuda: Any = torch.cuda
        self._stream = self._stream or cuda.Stream(inputs[0].device)
        for tensor in inputs:
            tensor.record_stream(self._stream)
        self._overlap = self._overlap or Overlap(self._stream)
        return self._overlap.beside()

    def join(self) -> Overlap | None:
        """Waits for what ran beside this step, and returns its marks; None where nothing did."""
        overlap, self._overlap = self._overlap, None
        if overlap is not None:
            overlap.join()
        return overlap


def _mark() -> Any:
    """An event on the current stream; within a graph, one that can be read after a replay."""
    cuda: Any = torch.cuda
    mark = cuda.Event(enable_timing=True, external=torch.cuda.is_current_stream_capturing())
    mark.record()
    return mark


def _seconds(begin: Any, end: Any) -> float:
    return float(begin.elapsed_time(end)) / 1000
