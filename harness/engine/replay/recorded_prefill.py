"""Prefill without launch gaps: what lies between two hooks at which a method acts, replayed as one CUDA graph.

A layer is a dozen kernels, and each costs the host tens of microseconds: up to some thousand rows that is longer than
the layer's products take, and hides what a method saves. A graph has its number of rows fixed, so rows are padded to
the next of a few numbers. Padding comes last, where causal attention shows it to no row that counts, so these come out
as ever. Keys and values go to where the request wants them (`harness.engine.replay.places`).

Recordings know no method: all that act at the same hooks share them. Where a layer's products take longer than its
launches the host is ahead by itself, and nothing is recorded.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from harness.engine.attention import Attention
from harness.engine.method import HOOKS, Hook
from harness.engine.replay.places import Held, Places
from harness.engine.shape import ModelShape
from harness.engine.step import Heads, Rows
from harness.engine.verbs import Verbs

_LAYER_FLOPS = 1e12
"""Products of a layer that take about as long as its launches do on a slow host: 1.5 ms on an H200."""
_MOST_ROWS = 8192
"""However small the model: rows have memory of their own here, and what attention takes grows by their square."""
_STEP = 128
"""Rows that products of matrices are cut into; less padding saves nothing."""
_STEPS = 16
"""Numbers of rows between one power of two and the next, at most."""
_HELD = 1 << 29
"""Bytes of keys, values and queries that layers may hold side by side: those of 28 layers of Qwen2.5-1.5B at 8K fit."""
_MOST = 4096
"""Recordings that are kept; a deep model needs a hundred for one number of rows."""

PROJECT, ATTEND, FEED_FORWARD = range(3)
VERBS = 3

_FIRST = 2 * VERBS
"""Verbs that take the device as long as the host takes to make the caches of all other layers."""


class Span(NamedTuple):
    """Verbs that follow each other: number `VERBS` * layer + verb, from `begin` up to `end`.

    Attributes:
        shows: what the last `PROJECT` makes is for a hook to see.
    """

    begin: int
    end: int
    shows: bool


def padded(rows: int) -> int:
    """The number of rows that as many are padded to: a multiple of 128, a sixteenth above at most."""
    step = max(_STEP, (1 << max(0, rows - 1).bit_length()) // 2 // _STEPS)
    return -(-rows // step) * step


class RecordedPrefill:
    """Runs verbs; of few rows, from recordings. Without CUDA these run as they are, so tests need no GPU.

    Attributes:
        captures: recordings that were made so far.
    """

    def __init__(self, verbs: Verbs, attention: Attention, shape: ModelShape, like: Tensor) -> None:
        """
        Args:
            verbs: what a layer does before and after its attention.
            attention: what it does between.
            shape: the model's.
            like: a weight of the model, [_, hidden].
        """
        from harness.engine.kernels.store_rows import COLUMNS, store_rows

        self._verbs, self._attention, self._shape, self._store = verbs, attention, shape, store_rows
        self.most = min(_MOST_ROWS, padded(int(_LAYER_FLOPS / (2 * shape.linear_params))))
        self._none = like.new_empty((0, shape.kv_heads, shape.head_dim))
        # Where recordings find their rows and leave what they made of them: one row for each of the prompt's.
        self._hidden, self._attended, self._qkv = (like.new_empty(0) for _ in range(3))
        self._positions = torch.empty(0, dtype=torch.int64, device=like.device)
        self._table = torch.zeros((shape.layers, COLUMNS.value), dtype=torch.int64, device=like.device)
        self._replays: dict[tuple[Span, int], Callable[[], None]] = {}
        self._pool: Any = None
        self._side: Any = None
        self._held: tuple[int, int] = (0, 0)
        self._count = 0
        self.captures = 0

    def run(self, span: Span, rows: Rows, places: Places) -> tuple[Rows, Heads | None]:
        """What full attention makes of rows.

        Args:
            span: the verbs.
            rows: with their attention, where the first verb is a feed forward.
            places: for what layers project whose attention is among the verbs.

        Returns:
            The rows, which the next call may overwrite, and what the span shows.
        """
        if not self.takes(len(rows)):
            return self._verb_by_verb(span, rows, places.append)
        size = padded(len(rows))
        self._enter(rows, size)
        self._load(span, places, len(rows))
        if (span, size) in self._replays:
            self._replays[span, size]()
        else:
            self._record(span, size)
        return self._result(span, len(rows), rows.positions)

    def held(self, layers: range, rows: Rows, queries: int) -> Held:
        """Room for what layers project from rows; of the first of them, if it is not enough for all."""
        bytes_each = Held.bytes_each(self._shape, padded(len(rows)), queries, self._none)
        parts = -(-len(layers) // max(1, _HELD // bytes_each))
        return Held(layers[: -(-len(layers) // parts)], self._shape, rows.positions, queries, self._none)

    def takes(self, rows: int) -> bool:
        """Whether so many rows are few enough to be replayed."""
        return rows <= self.most

    @property
    def nbytes(self) -> int:
        """Bytes that recordings hold on the device and that the allocator counts as free."""
        if self._pool is not None and self._held[0] != self.captures:
            cuda: Any = torch.cuda
            own = [part for part in cuda.memory_snapshot() if tuple(part["segment_pool_id"]) == tuple(self._pool)]
            self._held = self.captures, sum(part["total_size"] - part["allocated_size"] for part in own)
        return self._held[1]

    def _enter(self, rows: Rows, size: int) -> None:
        if not len(self._positions):
            self._make_room()
        count, stays = len(rows), len(rows) == self._count and rows.hidden.data_ptr() == self._hidden.data_ptr()
        if not stays:
            _fill(self._hidden, rows.hidden, size)
            self._positions[:count] = rows.positions
        if rows.attended is not None and rows.attended.data_ptr() != self._attended.data_ptr():
            _fill(self._attended, rows.attended, size)
        self._count = count

    def _make_room(self) -> None:
        shape, most = self._shape, self.most
        self._hidden = self._none.new_empty((most, shape.hidden))
        self._attended = self._none.new_empty((most, shape.heads * shape.head_dim))
        self._qkv = self._none.new_empty((most, shape.heads + 2 * shape.kv_heads, shape.head_dim))
        self._positions = self._positions.new_zeros(most)

    def _load(self, span: Span, places: Places, count: int) -> None:
        """Tells the kernels the places of the layers that store: those from the first to the last."""
        layers = range((span.begin + 1) // VERBS, (span.end + 1) // VERBS)
        if not layers:
            return
        lines = [places.line(layer, count, self._none) for layer in layers]
        self._table[layers.start : layers.stop].copy_(torch.tensor(lines), non_blocking=True)

    def _record(self, span: Span, size: int) -> None:
        (body := self._body(span, size))()
        if len(self._replays) == _MOST:
            del self._replays[next(iter(self._replays))]
        self._replays[span, size] = self._captured(body)
        self.captures += 1

    def _body(self, span: Span, size: int) -> Callable[[], None]:
        def run() -> None:
            # A view of its own for every recording: rotary angles are remembered by the identity of the positions.
            hidden, positions = self._hidden[:size], self._positions[:size]
            fed = span.begin % VERBS == FEED_FORWARD
            rows = Rows(hidden, positions, self._attended[:size] if fed else None)

            def store(layer: int, heads: Heads) -> None:
                self._store(heads.q, heads.k, heads.v, positions, self._table, layer)

            rows, heads = self._verb_by_verb(span, rows, store)
            self._leave(span, rows, heads, size)

        return run

    def _verb_by_verb(self, span: Span, rows: Rows, store: Callable[[int, Heads], None]) -> tuple[Rows, Heads | None]:
        heads = None
        for layer, verb in (divmod(number, VERBS) for number in range(span.begin, span.end)):
            if verb == PROJECT:
                heads = self._verbs.project(layer, rows)
            elif verb == ATTEND:
                assert heads is not None, "no span begins with attention"
                store(layer, heads)
                rows = rows.with_attended(self._attention.causal(heads.q, heads.k, heads.v))
            else:
                rows = self._verbs.feed_forward(layer, rows)
        return rows, heads

    def _leave(self, span: Span, rows: Rows, heads: Heads | None, size: int) -> None:
        if rows.hidden.data_ptr() != self._hidden.data_ptr():
            self._hidden[:size] = rows.hidden
        if rows.attended is not None:
            self._attended[:size] = rows.attended
        if span.shows and heads is not None:
            for place, made in zip(self._parts(self._qkv[:size]), (heads.q, heads.k, heads.v), strict=True):
                place.copy_(made)

    def _result(self, span: Span, count: int, positions: Tensor) -> tuple[Rows, Heads | None]:
        attended = self._attended[:count] if span.end % VERBS == FEED_FORWARD else None
        # A method may keep what it is shown, and the next recording writes to the same place.
        rows = Rows(self._hidden[:count], positions, attended)
        if not span.shows:
            return rows, None
        q, k, v = self._parts(self._qkv[:count].clone())
        return rows, Heads(q, k, v, positions)

    def _parts(self, qkv: Tensor) -> tuple[Tensor, ...]:
        return qkv.tensor_split((self._shape.heads, self._shape.heads + self._shape.kv_heads), 1)

    def _captured(self, body: Callable[[], None]) -> Callable[[], None]:
        if self._hidden.device.type != "cuda":
            return body
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        self._side = self._side or _stream()
        graph: Any = torch.cuda.CUDAGraph()
        self._side.wait_stream(torch.cuda.current_stream())
        # Not `torch.cuda.graph`, which empties the allocator's cache each time, and a deep model has a hundred spans.
        # One stream for all, since products of matrices keep a workspace for each.
        with torch.cuda.stream(self._side), _no_garbage():
            graph.capture_begin(pool=self._pool, capture_error_mode=self._verbs.ranks.capture)
            try:
                body()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._side)
        replay: Callable[[], None] = graph.replay
        return replay


class Passage:
    """A prompt on its way through the layers, run up to the hook that is asked next.

    Attributes:
        rows: as far as they have come; what a hook makes of them is put here.
    """

    def __init__(self, prefill: RecordedPrefill, rows: Rows, places: Places) -> None:
        """
        Args:
            prefill: runs the verbs.
            rows: enter the first layer.
            places: for what layers project, unless they are held.
        """
        self._prefill, self.rows, self._places, self._done = prefill, rows, places, 0
        self._heads: Heads | None = None
        self._held: Held | None = None

    def hold(self, layers: range, queries: int) -> None:
        """What layers project is held side by side from here on, if rows are few: of as many as there is memory for.

        Args:
            layers: the next ones.
            queries: how many of a layer's last ones are held.
        """
        if self._prefill.takes(len(self.rows)):
            self._held = self._prefill.held(layers, self.rows, queries)

    def holds(self, layer: int) -> bool:
        """Whether what a layer projects is held."""
        return self._held is not None and layer in self._held.layers

    def let_go(self, layer: int) -> tuple[range, Heads] | None:
        """Runs to the end of a layer if it is the last that holds; returns which do, and what."""
        held = self._held
        if held is None or layer != held.layers[-1]:
            return None
        self._run(Span(self._done, VERBS * (layer + 1), shows=False))
        self._held = None
        return held.layers, held.heads

    def reach(self, layer: int, hook: Hook) -> Heads:
        """Runs what lies ahead of a hook; returns what its layer projected before any row was dropped."""
        first = VERBS * layer
        self._run(Span(self._done, first + 1 + HOOKS.index(hook), shows=self._done <= first))
        assert self._heads is not None, "hooks are reached in their order"
        return self._heads

    def attended(self, attended: Tensor) -> None:
        """The hook attended in the place of full attention: [n, heads * head_dim]."""
        self.rows, self._done = self.rows.with_attended(attended), self._done + 1

    def finish(self, layers: int) -> Rows:
        """Runs what is left; returns what comes out of the last layer."""
        self._run(Span(self._done, VERBS * layers, shows=False))
        return self.rows

    def _run(self, span: Span) -> None:
        if span.begin == span.end:
            return
        for part in _parts(span):
            self.rows, heads = self._prefill.run(part, self.rows, self._held or self._places)
            self._heads, self._done = heads or self._heads, part.end


def _parts(span: Span) -> list[Span]:
    """The first layers are one by themselves: the device has them to do while the caches of the others are made."""
    if span.begin or span.end <= _FIRST:
        return [span]
    return [Span(0, _FIRST, shows=False), span._replace(begin=_FIRST)]


def _fill(place: Tensor, rows: Tensor, size: int) -> None:
    """Copies rows to the beginning of a place, and makes the padding zero that goes up to `size`.

    Not whatever is left there: no weight of attention, though zero, makes a number of what is none.
    """
    if rows.untyped_storage().data_ptr() == place.untyped_storage().data_ptr():
        rows = rows.clone()  # a part of what lies there
    place[: len(rows)] = rows
    if len(rows) < size:
        place[len(rows) : size] = 0


def _stream() -> Any:
    cuda: Any = torch.cuda
    return cuda.Stream()


@contextmanager
def _no_garbage() -> Iterator[None]:
    """What is collected while a stream is captured may call what must not be called there."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
