"""DuoAttention's recorded decode step: in a streaming head that is full, a new token takes the place of the oldest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from harness.engine.cache import HeadTokens, LayerCache
from harness.engine.ragged import RaggedCache
from harness.engine.replay.decode_table import DecodeTable
from harness.engine.replay.ragged import RaggedReplay
from harness.engine.step import Heads


class SinksAndRecent(RaggedReplay):
    """One new token: full streaming heads lose the oldest behind their sinks, and all heads attend to what they hold.

    All streaming heads hold as many tokens. While steps are replayed the recent ones lie in a ring: the newest, which
    is behind it, moves to the slot of the oldest when the next one comes. Afterwards they ascend again.
    """

    def __init__(self, sinks: int, recent: int) -> None:
        """
        Args:
            sinks, recent: first and last tokens that a streaming head keeps.
        """
        super().__init__()
        self._sinks, self._recent = sinks, recent
        self._positions = torch.empty((0, 0), dtype=torch.int64)

    def prepare(self, caches: Sequence[LayerCache], full: Sequence[Sequence[bool]]) -> None:
        """Is told of the request whose steps are to be replayed: its caches, and which of their heads keep all."""
        self._full = full
        if not len(self._positions):
            device, rows = caches[0].heads()[0].keys.device, sum(map(len, full))
            room = self._sinks + self._recent + 1
            self._positions = torch.empty((rows, room), dtype=torch.int64, device=device)
            self._streams = torch.empty(rows, dtype=torch.bool, device=device)
            self._chosen = torch.empty(rows, dtype=torch.int64, device=device)
            self._oldest = torch.empty((), dtype=torch.int64, device=device)

    def take(self, caches: Sequence[LayerCache], *, rehearsal: bool) -> None:
        """No head holds too many tokens yet, so a rehearsal takes nothing away."""
        self._streams.copy_(~torch.tensor(self._full).flatten())
        self._oldest.fill_(self._sinks)
        self._positions.fill_(-1)
        for row, (head, full) in zip(self._positions, _heads(caches, self._full), strict=True):
            if not full:
                row[: len(head.positions)] = head.positions

    def attend(self, layer: int, heads: Heads, table: DecodeTable) -> Tensor:
        """Makes room in all streaming heads ahead of the first layer."""
        if layer == 0:
            self._make_room(heads)
        return super().attend(layer, heads, table)

    def _make_room(self, heads: Heads) -> None:
        from harness.engine.kernels.eviction import drop_chosen

        rows = self._rows.view(-1, 3)
        over = self._streams & (rows[:, 2] > self._sinks + self._recent)
        self._chosen.copy_(torch.where(over, self._oldest, -1))
        drop_chosen(self._chosen, self._positions, heads.k[0, 0], rows, 0, len(rows))
        self._oldest.sub_(self._sinks).add_(over.any()).remainder_(self._recent).add_(self._sinks)
        slots = rows[:, 2:].clamp(max=self._sinks + self._recent)
        self._positions.scatter_(1, slots, heads.positions.expand_as(slots))

    def give_back(self, caches: Sequence[LayerCache], count: int, position: int) -> None:
        """Caches hold what the steps left there, by position, without a token of a step that nobody asked for."""
        super().give_back(caches, count, position)
        rows = self._positions.view(len(caches), -1, self._positions.shape[1])
        for cache, full, positions in zip(caches, self._full, rows, strict=True):
            assert isinstance(cache, RaggedCache)
            each, end = zip(cache.heads(), full, positions, strict=True), position + count
            cache.keep_heads([None if whole else self._ascending(head, row, end) for head, whole, row in each])

    def _ascending(self, head: HeadTokens, row: Tensor, end: int) -> Tensor:
        """Writes positions to where the steps put their tokens; indices of those that stay."""
        head.positions[: len(row)] = row[: len(head.positions)]
        stays = (row >= 0) & (row < end) & ((row < self._sinks) | (row >= end - self._recent))
        index = stays.nonzero().flatten()
        return index[row[index].argsort()]


def _heads(caches: Sequence[LayerCache], full: Sequence[Sequence[bool]]) -> list[tuple[HeadTokens, bool]]:
    each = zip(caches, full, strict=True)
    return [pair for cache, heads in each for pair in zip(cache.heads(), heads, strict=True)]
