"""Decode without launch gaps: a step is captured as CUDA graphs once, every token replays it.

A decode step of an 8B model is some 200 kernels of 5 to 60 microseconds; launching them one by one from Python takes
longer than running them and hides what a method saves. Addresses, lengths, token and position live on the device.

A method that promises the same device work for every token (`Method.static_decode`) is one graph. One whose steps
differ in how many rows run through which layers (`Method.cuts`) is cut there: every piece is captured for a few numbers
of rows, and the host, once it knows how many there are, replays those that fit.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import gcd
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from harness.engine.cache import LayerCache
from harness.engine.replay.decode_table import ResidentCaches
from harness.engine.replay.overlap import Overlap
from harness.engine.step import Rows

if TYPE_CHECKING:
    from harness.engine.method import Method

ROW_COUNTS = (1, 32, 128, 512)
"""Rows that a piece behind a cut is captured for. More run in portions of the greatest; fewer are padded."""

# Slices of a vocabulary that are reduced side by side: the best of 32 to 256 on an H200.
_SLICES = 256


@dataclass(frozen=True)
class StepParts:
    """One decode step on the resident caches, in parts.

    Attributes:
        embed: (token [1], position [1]) -> the token's row.
        layers: (row, layers, rows, last) -> rows. Runs so many rows through the layers: the newest token's is the last
            of them, or with `last` false not among them.
        logits: rows -> logits [vocab] of the last.
    """

    embed: Callable[[Tensor, Tensor], Rows]
    layers: Callable[[Rows, range, int, bool], Rows]
    logits: Callable[[Rows], Tensor]


class GraphedDecode:
    """Replays one method's decode step. Where there is no CUDA the step runs as it is, so tests need no GPU.

    Attributes:
        overlap: of the last step with what runs beside it; None where nothing does.
    """

    def __init__(self, parts: StepParts, layers: int, cuts: Sequence[int], resident: ResidentCaches) -> None:
        """
        Args:
            parts: the step.
            layers: how many there are.
            cuts: layers before which the step is cut.
            resident: the caches' table, shared by all methods of an engine.
        """
        self._parts, self._resident = parts, resident
        device = resident.table.device
        self._on_cuda = device.type == "cuda"
        self._token = torch.zeros(1, dtype=torch.int64, device=device)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._hidden = torch.empty(0)
        self._host = torch.zeros((2, 1), dtype=torch.int64, pin_memory=self._on_cuda)
        self._pieces = [Piece(range(*ends), ends[1] == layers) for ends in pairwise((0, *cuts, layers))]
        self._recorded = False
        self._key: Hashable = None
        self.overlap: Overlap | None = None

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
        given = 0
        try:
            if count:
                self._pieces[0].replay(1)
            while given < count:
                self._finish(method)
                arrived = self._fetch(given)
                given += 1
                if given < count:
                    self._pieces[0].replay(1)
                yield arrived()
        finally:
            method.replayed(given, position)

    def _prepare(self, method: Method, token: Tensor, position: int) -> None:
        key = method.capture_key()
        recording = not self._recorded or self._key != key
        if recording:
            method.ready_to_replay(rehearsal=True)
            self._load(method.cache, token, position)
            self._record()
            self._recorded, self._key = True, key
        self._load(method.cache, token, position)
        if recording:
            method.rewind(self._resident)
        method.ready_to_replay(rehearsal=False)

    def _load(self, caches: Sequence[LayerCache], token: Tensor, position: int) -> None:
        self._resident.load(caches)
        self._token.copy_(token)
        self._position.fill_(position)

    def _finish(self, method: Method) -> None:
        """Replays what is behind the first cut."""
        for piece in self._pieces[1:]:
            rows = method.arriving(piece.layers.start, self._resident)
            while rows > ROW_COUNTS[-1]:
                piece.replay(ROW_COUNTS[-1], last=False)
                rows -= ROW_COUNTS[-1]
            piece.replay(next(size for size in ROW_COUNTS if size >= rows))

    def _record(self) -> None:
        pool: Any = torch.cuda.graph_pool_handle() if self._on_cuda else None
        for piece in self._pieces:
            sizes = ROW_COUNTS if piece.layers.start else (1,)
            # What leaves out the newest token comes last: it counts rows that are not there.
            kinds = [(size, True) for size in sizes] + [(size, False) for size in sizes[-1:] if piece.layers.start]
            piece.replays = {kind: self._captured(self._body(piece, *kind), pool) for kind in kinds}

    def _body(self, piece: Piece, rows: int, last: bool) -> Callable[[], None]:
        def run() -> None:
            # A view of its own for every step: rotary angles are remembered by the identity of the positions.
            position = self._position.view(1)
            row = Rows(self._hidden, position) if piece.layers.start else self._parts.embed(self._token, position)
            out = self._parts.layers(row, piece.layers, rows, last)
            if last:
                self._end(out) if piece.ends else self._hand_on(out)

        return run

    def _hand_on(self, rows: Rows) -> None:
        if not len(self._hidden):
            self._hidden = torch.empty_like(rows.hidden[-1:])
        self._hidden.copy_(rows.hidden[-1:])

    def _end(self, rows: Rows) -> None:
        self._token.copy_(_argmax(self._parts.logits(rows)))
        self._position += 1
        self.overlap = self._resident.end_step()

    def _captured(self, body: Callable[[], None], pool: Any) -> Callable[[], None]:
        """Runs it once, so that all kernels are loaded, and records it."""
        if not self._on_cuda:
            return body
        body()
        graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            body()
        replay: Callable[[], None] = graph.replay
        return replay

    def _fetch(self, number: int) -> Callable[[], int]:
        """Sends a token to the host; returns what waits for it."""
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


def _argmax(logits: Tensor) -> Tensor:
    """The first of the greatest, [1]: of slices and then among them, since PyTorch reduces one vector on one block."""
    slices = logits.view(gcd(len(logits), _SLICES), -1)
    values, places = slices.max(1)
    best = values.argmax(0, keepdim=True)
    return places.gather(0, best) + best * slices.shape[1]


class Piece:
    """Layers of a step that run without the host.

    Attributes:
        layers: which.
        ends: whether the step ends with them.
        replays: by number of rows, and whether the newest token is the last of them.
    """

    def __init__(self, layers: range, ends: bool) -> None:
        self.layers, self.ends = layers, ends
        self.replays: dict[tuple[int, bool], Callable[[], None]] = {}

    def replay(self, rows: int, *, last: bool = True) -> None:
        """Runs it once more, for so many rows."""
        self.replays[rows, last]()
