"""DuoAttention's recorded decode step: in a streaming head that is full, a new token takes the place of the oldest."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from harness.engine.cache import HeadTokens, LayerCache
from harness.engine.ragged import RaggedCache
from harness.engine.replay.decode_table import DecodeTable
from harness.engine.replay.ragged import RaggedReplay
from harness.engine.replay.replay import Replay
from harness.engine.step import Heads


class SinksAndRecent(RaggedReplay):
    """One new token: full streaming heads lose the oldest behind their sinks, and all heads attend to what they hold.

    All streaming heads hold as many tokens. While steps are replayed the recent ones lie in a ring: the newest, which
    is behind it, moves to the slot of the oldest when the next one comes. Afterwards they ascend again.
    """

    def __init__(self, sinks: int, recent: int, seats: int = 1) -> None:
        """
        Args:
            sinks, recent: first and last tokens that a streaming head keeps.
            seats: requests at once.
        """
        super().__init__(seats)
        self._sinks, self._recent = sinks, recent
        self._positions = torch.empty((0, 0, 0), dtype=torch.int64)

    def prepare(self, caches: Sequence[LayerCache], full: Sequence[Sequence[bool]]) -> None:
        """Is told of the request whose steps are to be replayed: its caches, and which of their heads keep all."""
        self._full = full
        self._make_room(sum(map(len, full)), caches[0].heads()[0].keys.device)

    def _make_room(self, heads: int, device: torch.device) -> None:
        """Has memory for so many heads a seat, those of all layers."""
        if not len(self._positions):
            room = self._sinks + self._recent + 1
            numbers = partial(torch.zeros, dtype=torch.int64, device=device)
            self._positions = numbers((self._seats, heads, room))
            self._chosen, self._oldest = numbers((self._seats, heads)), numbers(self._seats)
            self._streams = torch.zeros((self._seats, heads), dtype=torch.bool, device=device)

    def take(self, caches: Sequence[LayerCache], *, rehearsal: bool) -> None:
        """No head holds too many tokens yet, so a rehearsal takes nothing away."""
        self._place(0, caches, self._full)

    def _place(self, seat: int, caches: Sequence[LayerCache], full: Sequence[Sequence[bool]]) -> None:
        self._streams[seat].copy_(~torch.tensor(full).flatten())
        self._oldest[seat] = self._sinks
        self._positions[seat].fill_(-1)
        for row, (head, whole) in zip(self._positions[seat], _heads(caches, full), strict=True):
            if not whole:
                row[: len(head.positions)] = head.positions

    def seats(self, count: int) -> Replay:
        """For the same number of heads."""
        other = SinksAndRecent(self._sinks, self._recent, count)
        other._make_room(self._positions.shape[1], self._positions.device)
        return other

    def serves(self, other: Replay) -> bool:
        """What keeps as many tokens, of whichever heads."""
        kept = self._sinks, self._recent
        return isinstance(other, SinksAndRecent) and (other._sinks, other._recent) == kept

    def sit(self, seat: int, other: Replay | None, caches: Sequence[LayerCache], table: DecodeTable) -> None:
        """As in the base; of nobody's heads none streams."""
        super().sit(seat, other, caches, table)
        nobody = [[True] * len(cache.heads()) for cache in caches]
        self._place(seat, caches, other._full if isinstance(other, SinksAndRecent) else nobody)

    def seated(self, table: DecodeTable) -> Sequence[Tensor]:
        """As in the base, and what streaming heads hold."""
        return [*super().seated(table), self._positions, self._streams, self._oldest]

    def rise(self, seat: int, other: Replay, table: DecodeTable) -> None:
        """Where tokens lie."""
        assert isinstance(other, SinksAndRecent)
        other._positions[0].copy_(self._positions[seat])

    def attend(self, layer: int, heads: Heads, table: DecodeTable) -> Tensor:
        """Makes room in all streaming heads ahead of the first layer."""
        if layer == 0:
            self._drop_oldest(heads)
        return super().attend(layer, heads, table)

    def _drop_oldest(self, heads: Heads) -> None:
        from harness.engine.kernels.eviction import drop_chosen

        each = (x[: len(heads)] for x in (self._rows, self._streams, self._chosen, self._oldest, self._positions))
        rows, streams, chosen, oldest, positions = each
        rows = rows.view(*streams.shape, 3)
        over = streams & (rows[..., 2] > self._sinks + self._recent)
        chosen.copy_(torch.where(over, oldest.unsqueeze(1), -1))
        drop_chosen(chosen.flatten(), positions.flatten(0, 1), heads.k[0, 0], rows.flatten(0, 1), 0, chosen.numel())
        oldest.sub_(self._sinks).add_(over.any(1)).remainder_(self._recent).add_(self._sinks)
        slots = rows[..., 2:].clamp(max=self._sinks + self._recent)
        positions.scatter_(2, slots, heads.positions.view(-1, 1, 1).expand_as(slots))

    def give_back(self, caches: Sequence[LayerCache], count: int, position: int) -> None:
        """Caches hold what the steps left there, by position, without a token of a step that nobody asked for."""
        super().give_back(caches, count, position)
        rows = self._positions.view(len(caches), -1, self._positions.shape[2])
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
