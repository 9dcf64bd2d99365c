"""StreamingLLM's recorded decode step: caches slide on the device, and sinks come in front of the window."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from harness.engine.cache import LayerCache
from harness.engine.replay.decode_table import DecodeTable
from harness.engine.replay.replay import Replay
from harness.engine.step import Heads
from methods.common.sinks import nearer, slide


class StreamingReplay(Replay):
    """One token: full caches begin one token later, sinks come in front of the window, the token behind it."""

    def __init__(self, sinks: int, move: Callable[[Tensor, Tensor], Tensor] | None) -> None:
        """
        Args:
            sinks: first tokens that all see.
            move: as `ModelContext.move`; None where sinks are seen from where they are in the text.
        """
        self._sinks, self._move = sinks, move
        self._front: Front | None = None
        self._window = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the sinks that steps take from."""
        return 0 if self._front is None else self._front.nbytes

    def prepare(self, caches: Sequence[LayerCache], window: int) -> None:
        """Is told of the request whose steps are to be replayed.

        Args:
            caches: a layer each, with all sinks.
            window: recent tokens that stay.
        """
        if self._front is None:
            self._front = Front(caches, self._sinks, moving=self._move is not None)
        self._front.take(caches)
        self._window = window

    def key(self) -> Hashable:
        """Changes with the window, which may be a share of the prompt."""
        return self._window

    def attend(self, layer: int, heads: Heads, table: DecodeTable) -> Tensor:
        """Slides all caches ahead of the first layer."""
        assert self._front is not None
        if layer == 0:
            table.slide(self._sinks + self._window, heads.k.nbytes)
            self._turn(heads.positions)
        self._front.put(layer, table)
        return table.attend(layer, heads)

    def _turn(self, position: Tensor) -> None:
        """Moves all layers' sinks to where the query at `position` ([1]) sees them."""
        if self._move is not None and self._sinks:
            assert self._front is not None
            keys = self._front.keys.flatten(0, 1)
            moved = self._move(keys, nearer(position, self._sinks, self._window).expand(len(keys)))
            self._front.seen.copy_(moved.view_as(self._front.seen))

    def give_back(self, caches: Sequence[LayerCache], count: int, position: int) -> None:
        """Slides the caches as the device did, and mends the sinks.

        A step that was begun and not asked for has overwritten the oldest recent token, which no later step sees.
        """
        super().give_back(caches, count, position)
        assert self._front is not None
        for layer, cache in enumerate(caches):
            slide(cache, self._sinks, self._window)
            self._front.copy_into(cache, layer)


class Front:
    """The sinks of all layers, from where every replayed step copies them in front of the window.

    Attributes:
        keys, values: [layers, sinks, kv_heads, head_dim], as caches hold them.
        seen: the keys as the next token meets them.
    """

    def __init__(self, caches: Sequence[LayerCache], sinks: int, *, moving: bool) -> None:
        """
        Args:
            caches: a layer each, not empty.
            sinks: tokens to hold of each.
            moving: tokens meet the keys elsewhere than caches hold them.
        """
        like = caches[0].keys
        self.keys, self.values = like.new_empty((2, len(caches), sinks, *like.shape[1:]))
        self.seen = torch.empty_like(self.keys) if moving else self.keys
        pairs = zip(self.seen, self.values, strict=True)
        self._addresses = torch.tensor([[part.data_ptr() for part in pair] for pair in pairs], device=like.device)
        self._block = torch.zeros(1, dtype=torch.int64, device=like.device)

    @property
    def nbytes(self) -> int:
        """Bytes of the sinks' keys and values."""
        seen = 0 if self.seen is self.keys else self.seen.nbytes
        return int(self.values.nbytes + self.keys.nbytes + seen)

    @torch.inference_mode()
    def take(self, caches: Sequence[LayerCache]) -> None:
        """Copies the sinks out of a request's caches."""
        sinks = self.keys.shape[1]
        self.keys.copy_(torch.stack([cache.keys[:sinks] for cache in caches]))
        self.values.copy_(torch.stack([cache.values[:sinks] for cache in caches]))

    def put(self, layer: int, table: DecodeTable) -> None:
        """Copies the sinks to where the layer's cache begins now."""
        from harness.engine.kernels.fetch import fetch_blocks

        if sinks := self.keys.shape[1]:
            fetch_blocks(self._block, self._addresses[layer], self.keys, table.rows, layer, sinks)

    def copy_into(self, cache: LayerCache, layer: int) -> None:
        """The same from the host."""
        sinks = self.keys.shape[1]
        cache.keys[:sinks], cache.values[:sinks] = self.keys[layer], self.values[layer]
