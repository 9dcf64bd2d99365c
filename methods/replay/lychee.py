"""LycheeDecode's recorded decode step: heads attend to all or to listed tokens, and lists are chosen on the device."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from harness.engine.replay.decode_table import DecodeTable
from harness.engine.replay.replay import Replay
from harness.engine.step import Heads
from methods.common.capacity import capacity


class LycheeReplay(Replay):
    """One new token: every layer's heads attend, and what its retrieval heads choose replaces their lists."""

    def __init__(self, retrieves: Sequence[Sequence[bool]], vote: Literal["mean", "max"], seats: int = 1) -> None:
        """
        Args:
            retrieves: for each layer, which KV heads look for tokens.
            vote: what of its query heads' attention rates a token.
            seats: requests at once.
        """
        self._retrieves, self._vote, self._seats = retrieves, vote, seats
        self._choosers = [[head for head, looks in enumerate(layer) if looks] for layer in retrieves]
        self._kernel: Any = None
        self._room, self._count, self._memory = 0, 0, object()

    @property
    def nbytes(self) -> int:
        """Bytes of what tokens are chosen in."""
        return 0 if self._kernel is None else int(self._kernel.nbytes)

    def make_room(self, total: int, count: int) -> None:
        """Has recorded steps choose `count` of that many tokens, in the last request's memory if it will do."""
        room = capacity(total, self._room)
        if (room, count) != (self._room, self._count):
            self._room, self._count, self._kernel, self._memory = room, count, None, object()

    def seats(self, count: int) -> Replay:
        """With room for as many tokens as this one's request may have; nothing outlives a step."""
        other = LycheeReplay(self._retrieves, self._vote, count)
        other._room, other._count = self._room, self._count
        return other

    def serves(self, other: Replay) -> bool:
        """What chooses as many of no more tokens, by the same heads."""
        return isinstance(other, LycheeReplay) and self._asked == other._asked and self._room >= other._room

    @property
    def _asked(self) -> tuple[Sequence[Sequence[bool]], str, int]:
        return self._retrieves, self._vote, self._count

    def key(self) -> Hashable:
        """Changes with the memory to choose in."""
        return self._memory

    def attend(self, layer: int, heads: Heads, table: DecodeTable) -> Tensor:
        """By the lists as the layer above has left them."""
        kernel = self._kernel = self._kernel or self._made(table)
        out: Tensor = kernel.attend(heads.q, heads.k, heads.v, self._whole[layer], table.rows, layer)
        if self._choosers[layer]:
            kernel.choose(self._chosen[layer], table.rows, layer, self._vote, len(heads))
        return out

    def _made(self, table: DecodeTable) -> Any:
        from harness.engine.kernels.listed_attention import ListedAttention

        self._whole = torch.tensor(self._retrieves, device=table.device)
        self._chosen = [torch.tensor(heads, device=table.device) for heads in self._choosers]
        shape = table.shape
        sizes = shape.heads, shape.kv_heads, shape.head_dim, self._room, self._count
        return ListedAttention(*sizes, table.device, batch=self._seats)
