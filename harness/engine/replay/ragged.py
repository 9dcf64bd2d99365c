"""Recorded decode steps over caches whose KV heads hold different numbers of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from harness.engine.cache import HeadTokens, LayerCache
from harness.engine.replay.decode_table import DecodeTable
from harness.engine.replay.overlap import Overlap
from harness.engine.replay.replay import Replay
from harness.engine.step import Heads


class RaggedReplay(Replay):
    """One new token a step attends to all that each KV head holds, however many tokens that is."""

    def __init__(self, seats: int = 1) -> None:
        """
        Args:
            seats: requests at once.
        """
        self._seats = seats
        # [seats, layers, kv_heads, 3] int64: what a row of `DecodeTable` says of a layer, of each of its KV heads.
        self._rows = torch.empty(0)

    def seats(self, count: int) -> Replay | None:
        """As in the base."""
        return RaggedReplay(count) if type(self) is RaggedReplay else None

    def load(self, caches: Sequence[LayerCache], table: DecodeTable) -> None:
        """From now on the kernels work on these `RaggedCache`s."""
        self._lay(0, caches, table)

    def sit(self, seat: int, other: Replay | None, caches: Sequence[LayerCache], table: DecodeTable) -> None:
        """As in the base."""
        self._lay(seat, caches, table)

    def _lay(self, seat: int, caches: Sequence[LayerCache], table: DecodeTable) -> None:
        rows = torch.tensor([[_row(head) for head in cache.heads()] for cache in caches])
        if not self._rows.numel():
            self._rows = torch.zeros((self._seats, *rows.shape), dtype=torch.int64, device=table.device)
        self._rows[seat].copy_(rows, non_blocking=True)

    def seated(self, table: DecodeTable) -> Sequence[Tensor]:
        """As in the base."""
        return [self._rows]

    def attend(self, layer: int, heads: Heads, table: DecodeTable) -> Tensor:
        """Stores each request's token behind those of every head and attends to all of them."""
        rows = self._rows[: len(heads)].flatten(0, 1)
        out: Tensor = table.attention.ragged(heads.q, heads.k, heads.v, rows, layer)
        return out

    def end_step(self) -> Overlap | None:
        """Every head holds one token more."""
        self._rows[..., 2] += 1
        return None


def _row(head: HeadTokens) -> list[int]:
    return [head.keys.data_ptr(), head.values.data_ptr(), len(head.keys)]
