"""Decode without launch gaps: a step is captured as CUDA graphs once, every token replays it.

A decode step of an 8B model is some 200 kernels of 5 to 60 microseconds; launching them one by one from Python takes
longer than running them and hides what a method saves. Addresses, lengths, token and position live on the device.

Requests that are decoded together are rows of one step, which is recorded for their number.

A method that does the same work on the device for every token is one graph. One whose steps differ in how many rows run
through which layers (`Replay.cuts`) is cut there: every piece is captured for a few numbers of rows, and the host, once
it knows how many there are, replays those that fit.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from contextlib import closing
from itertools import pairwise
from math import gcd
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from harness.engine.cache import LayerCache
from harness.engine.replay.decode_table import DecodeTable
from harness.engine.replay.overlap import Overlap
from harness.engine.replay.replay import Replay
from harness.engine.step import Rows
from harness.engine.verbs import Verbs

ROW_COUNTS = (1, 32, 128, 512)
"""Rows that a piece behind a cut is captured for. More run in portions of the greatest; fewer are padded."""

# Slices of a vocabulary that are reduced side by side: the best of 32 to 256 on an H200.
_SLICES = 256


class RecordedDecode:
    """Replays a decode step of one request, or of as many as the table has rows for.

    Where there is no CUDA the step runs as it is, so tests need no GPU.

    Attributes:
        overlap: of the last step with what runs beside it; None where nothing does.
        anew: whether the last request's steps had to be recorded, which happens once for memory of its size.
    """

    def __init__(
        self, embed: Callable[[Tensor], Tensor], verbs: Verbs, table: DecodeTable, cuts: Sequence[int]
    ) -> None:
        """
        Args:
            embed: ids [batch] -> hidden states [batch, hidden].
            verbs: what a layer does before and after its attention.
            table: of the caches, shared by all methods of an engine.
            cuts: layers before which the step is cut; none where there are several requests.
        """
        self._embed, self._verbs, self._table = embed, verbs, table
        self._on_cuda = table.device.type == "cuda"
        self._token = torch.zeros(table.batch, dtype=torch.int64, device=table.device)
        self._position = torch.zeros(table.batch, dtype=torch.int64, device=table.device)
        self._hidden = torch.empty(0)
        self._host = torch.zeros((2, table.batch), dtype=torch.int64, pin_memory=self._on_cuda)
        depth = table.shape.layers
        self._pieces = [Piece(range(*ends), ends[1] == depth) for ends in pairwise((0, *cuts, depth))]
        self._recorded, self.anew = False, False
        self._key: Hashable = None
        self.overlap: Overlap | None = None

    def tokens(
        self,
        replay: Replay,
        caches: Sequence[LayerCache],
        token: Tensor,
        position: int,
        count: int,
        stop_ids: frozenset[int],
    ) -> Iterator[int]:
        """Yields the tokens that follow, of one request.

        Args:
            replay: what the method does in a step.
            caches: a layer each, with room for `count` tokens.
            token: [1], the last one. position: its place in the sequence.
            count: tokens to come, at least 1.
            stop_ids: tokens behind which none follows.
        """

        def give_back(given: int) -> None:
            replay.give_back(caches, given, position)

        with closing(self.steps(replay, caches, token, [position], count, give_back)) as steps:
            for (out,) in steps:
                yield out
                if out in stop_ids:
                    return

    def steps(
        self,
        replay: Replay,
        caches: Sequence[LayerCache],
        token: Tensor,
        positions: Sequence[int],
        count: int,
        give_back: Callable[[int], None],
    ) -> Generator[list[int]]:
        """Yields each step's tokens, one of each request.

        The next step is under way before a token is handed out, so the device never waits for the host. What was begun
        and not asked for is forgotten.

        Args:
            replay: what is done in a step.
            caches: in the order of the table's rows, with room for `count` tokens.
            token: [batch], the last ones. positions: their places in their sequences.
            count: steps to come, at least 1.
            give_back: is told how many steps were handed out, when they end or are closed.
        """
        self._prepare(replay, caches, token, positions)
        yield from self._steps(replay, caches, count, give_back)

    def _steps(
        self, replay: Replay, caches: Sequence[LayerCache], count: int, give_back: Callable[[int], None]
    ) -> Generator[list[int]]:
        given = 0
        try:
            self._pieces[0].replay(1)
            while given < count:
                self._finish(replay, caches)
                arrived = self._fetch(given)
                given += 1
                if given < count:
                    self._pieces[0].replay(1)
                yield arrived()
        finally:
            give_back(given)

    def _prepare(self, replay: Replay, caches: Sequence[LayerCache], token: Tensor, positions: Sequence[int]) -> None:
        key = replay.key()
        # Ranks record together, or their sums would meet others: what one finds in its old memory another may not.
        self.anew = recording = self._verbs.ranks.any(not self._recorded or self._key != key)
        if recording:
            replay.take(caches, rehearsal=True)
            self._load(replay, caches, token, positions)
            self._record(replay)
            self._recorded, self._key = True, key
        self._load(replay, caches, token, positions)
        if recording:
            replay.undo(self._table)
        replay.take(caches, rehearsal=False)

    def _load(self, replay: Replay, caches: Sequence[LayerCache], token: Tensor, positions: Sequence[int]) -> None:
        replay.load(caches, self._table)
        self._place(token, positions)

    def _place(self, token: Tensor, positions: Sequence[int]) -> None:
        self._token.copy_(token)
        self._position.copy_(torch.tensor(positions), non_blocking=True)

    def _finish(self, replay: Replay, caches: Sequence[LayerCache]) -> None:
        """Replays what is behind the first cut."""
        for piece in self._pieces[1:]:
            rows = replay.arriving(piece.layers.start, caches, self._table)
            while rows > ROW_COUNTS[-1]:
                piece.replay(ROW_COUNTS[-1], last=False)
                rows -= ROW_COUNTS[-1]
            piece.replay(next(size for size in ROW_COUNTS if size >= rows))

    def _record(self, replay: Replay) -> None:
        pool: Any = torch.cuda.graph_pool_handle() if self._on_cuda else None
        for piece in self._pieces:
            sizes = ROW_COUNTS if piece.layers.start else (1,)
            # What leaves out the newest token comes last: it counts rows that are not there.
            kinds = [(size, True) for size in sizes] + [(size, False) for size in sizes[-1:] if piece.layers.start]
            piece.replays = {kind: self._captured(self._body(replay, piece, *kind), pool) for kind in kinds}

    def _body(self, replay: Replay, piece: Piece, count: int, last: bool) -> Callable[[], None]:
        # Whatever ends the method's object ends its recording too.
        held = ref(replay)

        def run() -> None:
            replay = held()
            assert replay is not None
            # A view of its own for every step: rotary angles are remembered by the identity of the positions.
            position = self._position.view(-1)
            if piece.layers.start:
                rows = replay.enter(piece.layers.start, Rows(self._hidden, position), count, last=last)
            else:
                rows = Rows(self._embed(self._token), position)
            rows = self._through(replay, rows, piece.layers, last)
            if last:
                self._end(replay, rows) if piece.ends else self._hand_on(rows)

        return run

    def _through(self, replay: Replay, rows: Rows, layers: range, last: bool) -> Rows:
        for layer in layers:
            heads = self._verbs.project(layer, rows)
            rows = rows.with_attended(replay.attend(layer, heads, self._table))
            replay.after_attention(layer, heads, self._table, last=last)
            rows = self._verbs.feed_forward(layer, rows)
            replay.after_layer(layer, rows, last=last)
        return rows

    def _hand_on(self, rows: Rows) -> None:
        if not len(self._hidden):
            self._hidden = torch.empty_like(rows.hidden[-1:])
        self._hidden.copy_(rows.hidden[-1:])

    def _end(self, replay: Replay, rows: Rows) -> None:
        logits = self._verbs.logits(rows) if self._table.batch == 1 else self._verbs.all_logits(rows)
        self._token.copy_(_argmax(logits))
        self._position += 1
        self.overlap = replay.end_step()
        self._table.advance()

    def _captured(self, body: Callable[[], None], pool: Any) -> Callable[[], None]:
        """Runs it once, so that all kernels are loaded, and records it."""
        if not self._on_cuda:
            return body
        body()
        graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode=self._verbs.ranks.capture):
            body()
        replay: Callable[[], None] = graph.replay
        return replay

    def _fetch(self, number: int) -> Callable[[], list[int]]:
        """Sends a step's tokens to the host; returns what waits for them."""
        slot = self._host[number % 2]
        slot.copy_(self._token, non_blocking=True)
        if not self._on_cuda:
            return slot.tolist
        arrived: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()

        def wait() -> list[int]:
            arrived.synchronize()
            return slot.tolist()

        return wait


def _argmax(logits: Tensor) -> Tensor:
    """The first of the greatest, of [n] or of each row of [batch, n]: [1] or [batch].

    Of slices and then among them, since PyTorch reduces one vector on one block.
    """
    width = logits.shape[-1]
    slices = logits.view(-1, gcd(width, _SLICES), width // gcd(width, _SLICES))
    values, places = slices.max(2)
    best = values.argmax(1, keepdim=True)
    return (places.gather(1, best) + best * slices.shape[2]).squeeze(1)


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
