"""Where a prefill puts what its layers project: into caches, side by side for a choice that is yet to be made, nowhere.

A recorded prefill is told by a line of numbers a layer (`harness.engine.kernels.store_rows`), one that is launched
kernel by kernel appends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from harness.engine.cache import LayerCache
from harness.engine.shape import ModelShape
from harness.engine.step import Heads


class Line(NamedTuple):
    """Of a layer, for the kernel.

    Attributes:
        keys, values, positions, queries: addresses; 0 for nowhere.
        rows: how many there are.
        first: of these whose query is stored.
        stride: elements from one row's keys to the next one's.
    """

    keys: int = 0
    values: int = 0
    positions: int = 0
    queries: int = 0
    rows: int = 0
    first: int = 0
    stride: int = 0


class Places(Protocol):
    """For what layers project."""

    def line(self, layer: int, count: int, like: Tensor) -> Line:
        """For so many rows of a layer, whose keys are `like`, [0, kv_heads, head_dim]."""

    def append(self, layer: int, heads: Heads) -> None:
        """Puts it there at once."""


class Caches:
    """The request's, empty so far."""

    def __init__(self, caches: Sequence[LayerCache]) -> None:
        """
        Args:
            caches: of all layers.
        """
        self._caches = caches

    def line(self, layer: int, count: int, like: Tensor) -> Line:
        """As `Places`; the cache counts the rows in."""
        keys, values, positions = self._caches[layer].expect(count, like)
        return Line(keys, values, positions, 0, count, count, like.shape[1] * like.shape[2])

    def append(self, layer: int, heads: Heads) -> None:
        """As `Places`."""
        self._caches[layer].append(heads.k, heads.v, heads.positions)


class Nowhere:
    """Nothing is kept."""

    def line(self, layer: int, count: int, like: Tensor) -> Line:
        """As `Places`: no rows."""
        return Line()

    def append(self, layer: int, heads: Heads) -> None:
        """Does nothing."""


class Held:
    """Layers side by side, as heads of one: all their keys and values, and the last queries.

    Attributes:
        layers: which.
        heads: keys and values of [n, layers * kv_heads, head_dim], queries of [held, layers * heads, head_dim].
    """

    def __init__(self, layers: range, shape: ModelShape, positions: Tensor, queries: int, like: Tensor) -> None:
        """
        Args:
            layers: which.
            shape: the model's.
            positions: of the rows, [n] int64.
            queries: how many of the last ones are held, where there are as many.
            like: of the dtype and device.
        """
        self.layers, self._shape, count, n = layers, shape, len(layers), len(positions)
        q = like.new_empty((min(queries, n), count * shape.heads, shape.head_dim))
        k, v = (like.new_empty((n, count * shape.kv_heads, shape.head_dim)) for _ in range(2))
        self.heads = Heads(q, k, v, positions)

    @staticmethod
    def bytes_each(shape: ModelShape, rows: int, queries: int, like: Tensor) -> int:
        """Bytes that a layer's part takes."""
        heads = 2 * rows * shape.kv_heads + min(queries, rows) * shape.heads
        return heads * shape.head_dim * like.element_size()

    def line(self, layer: int, count: int, like: Tensor) -> Line:
        """As `Places`; positions are known."""
        q, k, v = self._part(layer)
        return Line(k.data_ptr(), v.data_ptr(), 0, q.data_ptr(), count, count - len(q), k.stride(0))

    def append(self, layer: int, heads: Heads) -> None:
        """As `Places`."""
        for place, x in zip(self._part(layer), (heads.q, heads.k, heads.v), strict=True):
            place.copy_(x[len(x) - len(place) :])

    def _part(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        at = self.layers.index(layer)
        query, own = (slice(at * each, (at + 1) * each) for each in (self._shape.heads, self._shape.kv_heads))
        return self.heads.q[:, query], self.heads.k[:, own], self.heads.v[:, own]
