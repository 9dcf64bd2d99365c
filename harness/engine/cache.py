"""Keys and values of one layer, in memory that is reserved once a request."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from harness.engine.attention import Attention

_NOTHING, _NOWHERE = torch.empty(0), torch.empty((0, 1), dtype=torch.int64)
"""Keys and positions of a cache that holds no token yet: the same for all, since nothing is ever written to them."""


class HeadTokens(NamedTuple):
    """What one KV head of a layer holds.

    Attributes:
        keys, values: [n, head_dim].
        positions: [n] int64.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor


class LayerCache:
    """What one layer can still attend to.

    Token-major ([token, kv_head, channel]): appending and gathering tokens touch contiguous memory, and it is the
    layout of the flash kernels. Layers may hold different numbers of tokens, and KV heads different tokens. Memory is
    reserved at the first `append`, since only then does a pruned layer know how many tokens will enter it.
    """

    def __init__(self, spare: int, most: int | None = None) -> None:
        """
        Args:
            spare: tokens that will follow the first append (new tokens, a question).
            most: tokens that there can ever be, if that is known.
        """
        self.spare, self.most = spare, most
        self.length: int
        self._start: int
        self.reset()

    @property
    def keys(self) -> Tensor:
        """[length, kv_heads, head_dim], a view."""
        return self._keys[self._start : self._start + self.length]

    @property
    def values(self) -> Tensor:
        """[length, kv_heads, head_dim], a view."""
        return self._values[self._start : self._start + self.length]

    @property
    def addresses(self) -> tuple[int, int]:
        """Of `keys` and of `values`, without making them: a step's host has to ask every layer."""
        skipped = self._start * self._keys.stride(0) * self._keys.element_size()
        return self._keys.data_ptr() + skipped, self._values.data_ptr() + skipped

    @property
    def positions(self) -> Tensor:
        """Original positions of the tokens that each KV head holds, [length, kv_heads] int64, a view."""
        return self._held_positions.expand(-1, self._keys.shape[1] if self._keys.dim() > 1 else 1)

    @property
    def token_positions(self) -> Tensor:
        """The same where all KV heads hold the same tokens, [length] int64, a view that may be written to."""
        assert self.alike, "the KV heads of this layer hold different tokens"
        return self._held_positions[:, 0]

    @property
    def alike(self) -> bool:
        """Whether all KV heads hold the same tokens, as far as the memory for positions tells."""
        return self._positions.shape[1] == 1

    @property
    def _held_positions(self) -> Tensor:
        return self._positions[self._start : self._start + self.length]

    def heads(self) -> list[HeadTokens]:
        """What each KV head holds; none before the first `append`."""
        if not self.length:
            return []
        each = zip(self.keys.unbind(1), self.values.unbind(1), self.positions.unbind(1), strict=True)
        return [HeadTokens(*head) for head in each]

    def kept_positions(self) -> list[Tensor]:
        """Positions that are held, [n] int64: one entry for each KV head, or a single one where all hold the same."""
        return list(self._held_positions.unbind(1))

    def tokens_before(self, position: int) -> int | float:
        """Tokens at positions below `position`, mean over KV heads."""
        count = int((self._held_positions < position).sum()) / self._held_positions.shape[1]
        return int(count) if count.is_integer() else count

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values, the reserve for tokens to come included."""
        return self._keys.nbytes + self._values.nbytes

    @property
    def resident_nbytes(self) -> int:
        """Bytes of the keys and values that are there now."""
        return self.keys.nbytes + self.values.nbytes

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Adds tokens behind those that are there.

        Args:
            keys, values: [n, kv_heads, head_dim].
            positions: [n] int64, or [n, kv_heads] where the heads hold different tokens, which the first call decides.
        """
        positions = positions if positions.dim() == 2 else positions.unsqueeze(1)
        self._reserve(keys, values, positions, keys.shape[0])
        begin = self._start + self.length
        end = begin + keys.shape[0]
        self._keys[begin:end] = keys
        self._values[begin:end] = values
        self._positions[begin:end] = positions
        self.length += keys.shape[0]

    def extended(self, count: int, position: int) -> None:
        """Counts `count` tokens in, at `position` and behind it, whose keys and values a kernel has already written."""
        begin = self._start + self.length
        new = torch.arange(position, position + count, device=self._positions.device)
        self._positions[begin : begin + count] = new.unsqueeze(1)
        self.length += count

    def attend(self, attention: Attention, q: Tensor) -> Tensor:
        """Causal attention of the last tokens, [n, heads, head_dim] queries, to all that are there: [n, heads * d]."""
        return attention.causal(q, self.keys, self.values)

    def claim(self, count: int) -> bool:
        """Counts in `count` tokens whose keys and values a kernel will write; their positions are to be written, too.

        Returns:
            Whether keys and values lie elsewhere now.
        """
        moved = self.make_room(count)
        self.length += count
        return moved

    def expect(self, count: int, like: Tensor, columns: int = 1) -> tuple[int, int, int]:
        """Counts in `count` tokens whose keys, values and positions a kernel will write, as the first that are here.

        Args:
            count: tokens.
            like: [0, kv_heads, head_dim], of the keys' dtype and device.
            columns: of positions: as many as KV heads, or 1 where all of these hold the same tokens.

        Returns:
            The addresses of keys, values and positions.
        """
        # No more than has to be: the device waits while a short prompt's caches are made, one after the other.
        room = self._counted(count)
        self._keys = like.new_empty((room, *like.shape[1:]))
        self._values = torch.empty_like(self._keys)
        self._positions = like.new_empty((room, columns), dtype=torch.int64)
        return self._keys.data_ptr(), self._values.data_ptr(), self._positions.data_ptr()

    def _counted(self, count: int) -> int:
        """Counts in the first tokens; returns how many there must be room for."""
        assert not self.length, "there are tokens already"
        room = self._room(count)
        self.length, self._start = count, 0
        return room

    def make_room(self, count: int) -> bool:
        """Has room for `count` tokens behind the cached ones, of which there is at least one; returns as `claim`."""
        if self.room >= count:
            return False
        before = self._keys
        self._reserve(self._keys[:0], self._values[:0], self._positions[:0], count)
        return self._keys is not before

    @property
    def room(self) -> int:
        """Tokens that fit behind the cached ones without new memory."""
        return self._keys.shape[0] - self._start - self.length

    def keep(self, index: Tensor) -> None:
        """Forgets all tokens but those at `index`; the memory stays reserved.

        Args:
            index: [m] int64, or [m, kv_heads] for each KV head its own.
        """
        count = index.shape[0]
        if index.dim() == 2 and self.alike:
            self._positions = self._positions.expand(-1, index.shape[1]).contiguous()
        for store, now in self._stores():
            store[:count] = gather(now, index)
        self._start, self.length = 0, count

    def place(self, positions: Tensor) -> None:
        """Notes the positions of tokens that a kernel has written or moved, [length, kv_heads]."""
        if self.alike:
            self._positions = self._positions.expand(-1, positions.shape[1]).contiguous()
        self._held_positions[:] = positions

    def reset(self) -> None:
        """Forgets everything and gives the memory back."""
        self.length = self._start = 0
        self._keys = self._values = _NOTHING
        self._positions = _NOWHERE

    def move(self, keys: Tensor, values: Tensor) -> None:
        """Keys and values lie in other memory from now on, which already holds them; theirs so far is given back.

        Args:
            keys, values: [length + room, kv_heads, head_dim], contiguous; the device's memory, or pinned host memory.
        """
        self._keys, self._values, self._positions = keys, values, self._positions[self._start :]
        self._start = 0

    def slide(self, sinks: int, count: int) -> None:
        """Forgets the `count` oldest tokens behind the first `sinks`.

        The sinks move up to close the gap, so a sliding window costs a few copied tokens a step, not the window.
        """
        for store, now in self._stores():
            store[self._start + count : self._start + count + sinks] = now[:sinks].clone()
        self._start += count
        self.length -= count

    def _stores(self) -> list[tuple[Tensor, Tensor]]:
        whole = (self._keys, self._values, self._positions)
        return list(zip(whole, (self.keys, self.values, self._held_positions), strict=True))

    def _reserve(self, keys: Tensor, values: Tensor, positions: Tensor, count: int) -> None:
        needed = self.length + count
        if self._start + needed <= self._keys.shape[0]:
            return
        room = self._room(needed)
        self._positions = _grown(self._held_positions, positions if not self.length else self._positions, room)
        self._keys = _grown(self.keys, keys, room)
        self._values = _grown(self.values, values, room)
        self._start = 0

    def _room(self, needed: int) -> int:
        if self.length == 0:
            return needed + self.spare
        # More than asked for, so that what comes in a little at a time is not copied every time.
        ample = needed + max(self.spare, needed // 8)
        return max(needed, self._keys.shape[0], min(ample, self.most or ample))


def expect_each(
    caches: Sequence[LayerCache], counts: Sequence[int], like: Tensor, columns: int = 1
) -> list[tuple[int, int, int]]:
    """`LayerCache.expect` for many caches, in memory of one piece, which is there as long as one of them is.

    A piece for each would take the host a millisecond where every KV head has a cache of its own.
    """
    rooms = [cache._counted(count) for cache, count in zip(caches, counts, strict=True)]
    keys = like.new_empty((sum(rooms), *like.shape[1:]))
    values, positions = torch.empty_like(keys), like.new_empty((len(keys), columns), dtype=torch.int64)
    parts = (torch.split(x, rooms) for x in (keys, values, positions))
    for cache, *own in zip(caches, *parts, strict=True):
        cache._keys, cache._values, cache._positions = own
    (k, v, p), token, place = (x.data_ptr() for x in (keys, values, positions)), keys[0].nbytes, 8 * columns
    return [(k + at * token, v + at * token, p + at * place) for at in accumulate(rooms[:-1], initial=0)]


def _grown(old: Tensor, like: Tensor, room: int) -> Tensor:
    new = like.new_empty((room, *like.shape[1:]))
    if old.shape[0]:
        new[: old.shape[0]] = old
    return new


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Tokens at an index: of every KV head the same ones, or of each its own.

    Args:
        x: [n, kv_heads, ...], or [n, 1] of positions that all heads share, in which case `index` has one dimension.
        index: [m] or [m, kv_heads] int64.

    Returns:
        [m, kv_heads, ...].
    """
    if index.dim() == 1:
        return x.index_select(0, index)
    return x[index, torch.arange(index.shape[1], device=index.device)]
