"""Keys and values of one layer whose KV heads hold different numbers of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from harness.engine.attention import Attention
from harness.engine.cache import HeadTokens, LayerCache


class RaggedCache(LayerCache):
    """A `LayerCache` for each KV head of a layer, so that a head's memory is as long as what it holds.

    There are no keys or values of the whole layer: `heads` and `attend` take the place of what reads them as one
    tensor. The layer's `length` is that of the head with the most tokens, its `room` that of the head with the least.
    """

    def reset(self) -> None:
        """Forgets everything and gives the memory back."""
        super().reset()
        self._each: list[LayerCache] = []

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Adds the same number of tokens to every head, as `LayerCache.append`."""
        columns = positions.unsqueeze(1) if positions.dim() == 1 else positions
        each = zip(keys.unbind(1), values.unbind(1), columns.expand(-1, keys.shape[1]).unbind(1), strict=True)
        self.append_heads([HeadTokens(*head) for head in each])

    def apart(self, heads: int) -> Sequence[LayerCache]:
        """The cache of each of so many KV heads; whoever fills them calls `measure`."""
        self._each = self._each or [LayerCache(self.spare, self.most) for _ in range(heads)]
        return self._each

    def append_heads(self, tokens: Sequence[HeadTokens]) -> None:
        """Adds to each head its own tokens, at least one."""
        for cache, head in zip(self.apart(len(tokens)), tokens, strict=True):
            cache.append(head.keys.unsqueeze(1), head.values.unsqueeze(1), head.positions)
        self.measure()

    @classmethod
    def of(cls, cache: LayerCache, index: Sequence[Tensor]) -> RaggedCache:
        """What each KV head of a cache keeps, in memory of its own: tokens at its index, [m] int64, at least one."""
        kept = cls(cache.spare, cache.most)
        pairs = zip(cache.heads(), index, strict=True)
        kept.append_heads([HeadTokens(*(x[own] for x in head)) for head, own in pairs])
        return kept

    def keep_heads(self, index: Sequence[Tensor | None]) -> None:
        """Forgets all tokens of each head but those at its own index, [m] int64; None keeps them all."""
        for cache, own in zip(self._each, index, strict=True):
            if own is not None:
                cache.keep(own)
        self.measure()

    def extended(self, count: int, position: int) -> None:
        """Counts tokens in that a kernel has written behind every head's, as `LayerCache.extended`."""
        for cache in self._each:
            cache.extended(count, position)
        self.measure()

    def attend(self, attention: Attention, q: Tensor) -> Tensor:
        """One attention for each KV head and the query heads that read it; as `LayerCache.attend`."""
        groups = q.chunk(len(self._each), 1)
        outs = [cache.attend(attention, queries) for cache, queries in zip(self._each, groups, strict=True)]
        return torch.cat(outs, 1)

    def heads(self) -> list[HeadTokens]:
        """What each KV head holds."""
        return [head for cache in self._each for head in cache.heads()]

    def kept_positions(self) -> list[Tensor]:
        """Positions that each KV head holds, [n] int64; a single entry, with none, before there are heads."""
        each = [positions for cache in self._each for positions in cache.kept_positions()]
        return each or super().kept_positions()

    def tokens_before(self, position: int) -> int | float:
        """Tokens at positions below `position`, mean over KV heads."""
        count = sum(cache.tokens_before(position) for cache in self._each) / max(1, len(self._each))
        return int(count) if count.is_integer() else count

    def measure(self) -> None:
        """Counts anew, behind what the heads' own caches took in."""
        self.length = max(cache.length for cache in self._each)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values, the reserve for tokens to come included."""
        return sum(cache.nbytes for cache in self._each)

    @property
    def resident_nbytes(self) -> int:
        """Bytes of the keys and values that are there now."""
        return sum(cache.resident_nbytes for cache in self._each)

    @property
    def room(self) -> int:
        """Tokens that fit behind those of every head without new memory."""
        return min((cache.room for cache in self._each), default=0)

    @property
    def keys(self) -> Tensor:
        """There is no such tensor."""
        _no_tensor()

    @property
    def values(self) -> Tensor:
        """There is no such tensor."""
        _no_tensor()

    @property
    def addresses(self) -> tuple[int, int]:
        """There are no such tensors."""
        _no_tensor()

    @property
    def positions(self) -> Tensor:
        """There is no such tensor."""
        _no_tensor()


def _no_tensor() -> NoReturn:
    raise TypeError("the KV heads of this layer hold different numbers of tokens: see `heads`")
