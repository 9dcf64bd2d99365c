"""Decode without launch gaps: one step is captured as a CUDA graph, every token replays it.

A decode step of an 8B model is some 200 kernels of 5 to 60 microseconds; launching them one by one from Python takes
longer than running them and hides what a method saves. A method that promises the same device work for every token
(`Method.static_decode`) gets its step captured once; addresses, lengths, token and position live on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from harness.cache import LayerCache
from harness.overlap import Overlap
from harness.resident import ResidentCaches

if TYPE_CHECKING:
    from methods.base import Method


class GraphedDecode:
    """Replays one method's decode step. Where there is no CUDA the step runs as it is, so tests need no GPU.

    Attributes:
        overlap: of the last step with what runs beside it; None where nothing does.
    """

    def __init__(self, forward: Callable[[Tensor, Tensor], Tensor], resident: ResidentCaches) -> None:
        """
        Args:
            forward: (token [1], position [1]) -> logits [vocab]; one decode step on the resident caches.
            resident: the caches' table, shared by all methods of an engine.
        """
        self._forward, self._resident = forward, resident
        device = resident.table.device
        self._on_cuda = device.type == "cuda"
        self._token = torch.zeros(1, dtype=torch.int64, device=device)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._host = torch.zeros((2, 1), dtype=torch.int64, pin_memory=self._on_cuda)
        self._replay: Callable[[], None] | None = None
        self.overlap: Overlap | None = None
        self._key: Hashable = None

    def tokens(self, method: Method, token: Tensor, position: int, count: int) -> Iterator[int]:
        """Yields the `count` tokens that follow.

        The next step is under way before a token is handed out, so the device never waits for the host. What was begun
        and not asked for is forgotten.

        Args:
            method: whose caches have room for `count` tokens.
            token: [1], the last one. position: its place in the sequence.
            count: tokens to come.
        """
        self._prepare(method, token, position)
        given, ahead = 0, self._step(0) if count else None
        try:
            while ahead is not None:
                arrived, ahead = ahead, self._step(given + 1) if given + 1 < count else None
                given += 1
                yield arrived()
        finally:
            method.replayed(given, position)

    def _prepare(self, method: Method, token: Tensor, position: int) -> None:
        key = method.capture_key()
        self._load(method.cache, token, position)
        if self._replay is None or self._key != key:
            self._replay, self._key = self._capture(), key
            self._load(method.cache, token, position)
            method.rewind(self._resident)

    def _load(self, caches: Sequence[LayerCache], token: Tensor, position: int) -> None:
        self._resident.load(caches)
        self._token.copy_(token)
        self._position.fill_(position)

    def _body(self) -> None:
        # A view of its own for every step: rotary angles are remembered by the identity of the positions.
        logits = self._forward(self._token, self._position.view(1))
        self._token.copy_(logits.argmax())
        self._position += 1
        self.overlap = self._resident.end_step()

    def _capture(self) -> Callable[[], None]:
        """Runs the step once, so that all kernels are loaded, and records it; what that left behind is taken back."""
        if not self._on_cuda:
            return self._body
        self._body()
        graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._body()
        replay: Callable[[], None] = graph.replay
        return replay

    def _step(self, number: int) -> Callable[[], int]:
        """Launches a step; returns what waits for its token."""
        assert self._replay is not None
        self._replay()
        slot = self._host[number % 2]
        slot.copy_(self._token, non_blocking=True)
        if not self._on_cuda:
            return lambda: int(slot)
        arrived: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()

        def wait() -> int:
            arrived.synchronize()
            return int(slot)

        return wait
