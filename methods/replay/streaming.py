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

    def __init__(self, sinks: int, move: Callable[[Tensor, Tensor], Tensor] | None, seats: int = 1) -> None:
        """
        Args:
            sinks: first tokens that all see.
            move: as `ModelContext.move`; None where sinks are seen from where they are in the text.
            seats: requests at once.
        """
        self._sinks, self._move, self._seats = sinks, move, seats
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
        self._made(caches).take(0, caches)
        self._window = window

    def _made(self, caches: Sequence[LayerCache]) -> Front:
        if self._front is None:
            self._front = Front(caches, self._seats, self._sinks, moving=self._move is not None)
        return self._front

    def seats(self, count: int) -> Replay:
        """With the same window."""
        other = StreamingReplay(self._sinks, self._move, count)
        other._window = self._window
        return other

    def serves(self, other: Replay) -> bool:
        """What has the same sinks, seen from the same place, and the same window."""
        return isinstance(other, StreamingReplay) and other._asked == self._asked

    @property
    def _asked(self) -> tuple[int, int, bool]:
        return self._sinks, self._window, self._move is None

    def sit(self, seat: int, other: Replay | None, caches: Sequence[LayerCache], table: DecodeTable) -> None:
        """With the request's sinks."""
        super().sit(seat, other, caches, table)
        self._made(caches).take(seat, None if other is None else caches)

    def seated(self, table: DecodeTable) -> Sequence[Tensor]:
        """As in the base, and the sinks."""
        return [*super().seated(table), *(() if self._front is None else self._front.seated)]

    def key(self) -> Hashable:
        """Changes with the window, which may be a share of the prompt."""
        return self._window

    def attend(self, layer: int, heads: Heads, table: DecodeTable) -> Tensor:
        """Slides all caches ahead of the first layer, and puts the sinks in front of their windows."""
        assert self._front is not None
        if layer == 0:
            table.slide(self._sinks + self._window, heads.k[0].nbytes)
            self._turn(heads.positions)
            self._front.put(table)
        return table.attend(layer, heads)

    def _turn(self, positions: Tensor) -> None:
        """Moves all layers' sinks to where the queries at `positions`, one a request, see them."""
        if self._move is not None and self._sinks:
            assert self._front is not None
            keys, seen = (x[: len(positions)] for x in (self._front.keys, self._front.seen))
            by = nearer(positions, self._sinks, self._window).view(-1, 1, 1).expand(keys.shape[:3])
            seen.copy_(self._move(keys.flatten(0, 2), by.flatten()).view_as(seen))

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
        keys, values: [seats, layers, sinks, kv_heads, head_dim], as caches hold them.
        seen: the keys as the next token meets them.
        seated: all that is of one request, [seats, ...] each.
    """

    def __init__(self, caches: Sequence[LayerCache], seats: int, sinks: int, *, moving: bool) -> None:
        """
        Args:
            caches: of one request, a layer each, not empty.
            seats: requests at once.
            sinks: tokens to hold of each cache.
            moving: tokens meet the keys elsewhere than caches hold them.
        """
        like = caches[0].keys
        self.keys, self.values = like.new_zeros((2, seats, len(caches), sinks, *like.shape[1:]))
        self.seen = torch.empty_like(self.keys) if moving else self.keys
        pairs = zip(self.seen.flatten(0, 1), self.values.flatten(0, 1), strict=True)
        self._addresses = torch.tensor([[part.data_ptr() for part in pair] for pair in pairs], device=like.device)
        # The only block that there is, or none.
        self._block = torch.full((seats, len(caches)), -1, dtype=torch.int64, device=like.device)
        self.seated = self.keys, self.values, self._block

    @property
    def nbytes(self) -> int:
        """Bytes of the sinks' keys and values."""
        seen = 0 if self.seen is self.keys else self.seen.nbytes
        return int(self.values.nbytes + self.keys.nbytes + seen)

    @torch.inference_mode()
    def take(self, seat: int, caches: Sequence[LayerCache] | None) -> None:
        """Copies the sinks out of a request's caches; None for nobody, who has none."""
        self._block[seat] = -1 if caches is None else 0
        if caches is not None:
            sinks = self.keys.shape[2]
            self.keys[seat].copy_(torch.stack([cache.keys[:sinks] for cache in caches]))
            self.values[seat].copy_(torch.stack([cache.values[:sinks] for cache in caches]))

    def put(self, table: DecodeTable) -> None:
        """Copies the sinks to where each layer's cache begins now, for all requests of the table."""
        from harness.engine.kernels.fetch import fetch_blocks

        if sinks := self.keys.shape[2]:
            source, count = self._block.view(-1, 1), len(table.rows)
            fetch_blocks(source, self._addresses, self.keys, table.rows, 0, sinks, count)

    def copy_into(self, cache: LayerCache, layer: int) -> None:
        """The same from the host, of the only request."""
        sinks = self.keys.shape[2]
        cache.keys[:sinks], cache.values[:sinks] = self.keys[0, layer], self.values[0, layer]
