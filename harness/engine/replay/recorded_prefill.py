"""Prefill without launch gaps: layers in which a method does nothing of its own, replayed as one CUDA graph.

A layer is a dozen kernels, and each costs the host tens of microseconds: up to some thousand rows that is longer than
the layer's products take, and hides what a method saves. A graph has its number of rows fixed, so rows are padded to
the next of a few numbers. Padding comes last, where causal attention shows it to no row that counts, so these come out
as ever. Keys and values go to the request's own caches (`harness.engine.kernels.store_rows`).

Where a layer's products take longer than its launches nothing is recorded: there the host is ahead by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from harness.engine.attention import Attention
from harness.engine.cache import LayerCache
from harness.engine.shape import ModelShape
from harness.engine.step import Rows
from harness.engine.verbs import Verbs

_LAYER_FLOPS = 6e11
"""Products of a layer that take about as long as its launches: 0.9 ms on an H200."""
_STEP = 128
"""Rows that products of matrices are cut into; less padding saves nothing."""
_STEPS = 16
"""Numbers of rows between one power of two and the next, at most."""


def padded(rows: int) -> int:
    """The number of rows that as many are padded to: a multiple of 128, a sixteenth above at most."""
    step = max(_STEP, (1 << max(0, rows - 1).bit_length()) // 2 // _STEPS)
    return -(-rows // step) * step


class RecordedPrefill:
    """Replays runs of layers. Where there is no CUDA they run as they are, so tests need no GPU.

    Attributes:
        nbytes: that recordings hold on the device and that the allocator counts as free.
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
        self.most = padded(int(_LAYER_FLOPS / (2 * shape.linear_params)))
        self._heads = like.new_empty((0, shape.kv_heads, shape.head_dim))
        self._hidden = like.new_empty((0, shape.hidden))
        self._positions = torch.empty(0, dtype=torch.int64, device=like.device)
        self._table = torch.zeros((shape.layers, COLUMNS.value), dtype=torch.int64, device=like.device)
        self._replays: dict[tuple[range, int], Callable[[], None]] = {}
        self._pool: Any = None
        self.nbytes = 0

    def takes(self, rows: int) -> bool:
        """Whether so many rows are few enough to be worth it."""
        return rows <= self.most

    def run(self, layers: range, rows: Rows, caches: Sequence[LayerCache]) -> Rows:
        """What full attention makes of rows in some layers, whose caches take in their keys and values.

        Args:
            layers: one after the other.
            rows: few enough, see `takes`; they may lie in what an earlier call returned.
            caches: of all layers; those of `layers` are empty.

        Returns:
            Rows whose hidden states are overwritten by the next call.
        """
        size = padded(len(rows))
        self._enter(rows, size)
        self._load(layers, caches, len(rows))
        if (layers, size) in self._replays:
            self._replays[layers, size]()
        else:
            (body := self._body(layers, size))()
            self._replays[layers, size] = self._captured(body)
        return Rows(self._hidden[: len(rows)], rows.positions)

    def _enter(self, rows: Rows, size: int) -> None:
        if not len(self._hidden):
            self._hidden = self._hidden.new_empty((self.most, self._shape.hidden))
            self._positions = self._positions.new_zeros(self.most)
        count = len(rows)
        if rows.hidden.data_ptr() != self._hidden.data_ptr():
            self._hidden[:count] = rows.hidden
        # Not whatever is left there: no weight of attention, though zero, makes a number of what is none.
        self._hidden[count:size] = 0
        self._positions[:count] = rows.positions

    def _load(self, layers: range, caches: Sequence[LayerCache], count: int) -> None:
        lines = []
        for layer in layers:
            caches[layer].expect(count, self._heads)
            lines.append([*caches[layer].addresses(), count])
        self._table[layers.start : layers.stop].copy_(torch.tensor(lines), non_blocking=True)

    def _body(self, layers: range, size: int) -> Callable[[], None]:
        def run() -> None:
            # A view of its own for every recording: rotary angles are remembered by the identity of the positions.
            hidden, positions = self._hidden[:size], self._positions[:size]
            rows = Rows(hidden, positions)
            for layer in layers:
                heads = self._verbs.project(layer, rows)
                self._store(heads.k, heads.v, positions, self._table, layer)
                attended = self._attention.causal(heads.q, heads.k, heads.v)
                rows = self._verbs.feed_forward(layer, rows.with_attended(attended))
            if rows.hidden.data_ptr() != hidden.data_ptr():
                hidden.copy_(rows.hidden)

        return run

    def _captured(self, body: Callable[[], None]) -> Callable[[], None]:
        if self._hidden.device.type != "cuda":
            return body
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            body()
        self.nbytes = _held(self._pool)
        replay: Callable[[], None] = graph.replay
        return replay


def _held(pool: tuple[int, int]) -> int:
    """Bytes of the memory that recordings share, which the allocator counts as free between two captures."""
    segments: Any = torch.cuda.memory_snapshot()
    return sum(part["total_size"] for part in segments if tuple(part["segment_pool_id"]) == tuple(pool))
