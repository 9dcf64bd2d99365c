"""Quest's recorded decode step: pages are rated, chosen and attended to on the device."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal

import torch
from torch import Tensor

from harness.engine.replay.decode_table import DecodeTable
from harness.engine.replay.pages import MOST_PAGES, PagedAttention
from harness.engine.replay.replay import Replay
from harness.engine.step import Heads
from methods.common.capacity import capacity
from methods.common.paging import PageBounds


class QuestReplay(Replay):
    """Chosen pages behind the dense layers.

    Attributes:
        room: pages that a step can choose from.
    """

    def __init__(self, dense_layers: int, page: int, per: Literal["query_head", "kv_head"]) -> None:
        """
        Args:
            dense_layers: first layers that read everything.
            page: tokens a page.
            per: who chooses pages.
        """
        self._dense_layers, self._page, self._per = dense_layers, page, per
        self._attention: PagedAttention | None = None
        self._memory, self._tokens, self.room, self._count = object(), 0, 0, 0
        # Recorded steps find the bounds of the request by their addresses.
        self._addresses = torch.zeros(0, dtype=torch.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of what pages are chosen in, room for longer requests included."""
        return 0 if self._attention is None else self._attention.nbytes

    def make_room(self, total: int) -> None:
        """Has recorded steps choose among the pages of that many tokens, in the last request's memory if it will do."""
        self._tokens = capacity(total, self._tokens)
        # More than a recorded step can choose from only where they are needed.
        room = max(-(-total // self._page), min(-(-self._tokens // self._page), MOST_PAGES))
        if room != self.room:
            self.room, self._attention, self._memory = room, None, object()

    @torch.inference_mode()
    def prepare(self, pages: Sequence[PageBounds], count: int) -> None:
        """Is told of the request whose steps are to be replayed.

        Args:
            pages: bounds, a layer each.
            count: pages that a step attends to.
        """
        addresses = torch.tensor([[layer.low.data_ptr(), layer.high.data_ptr()] for layer in pages])
        if not len(self._addresses):
            self._addresses = addresses.to(pages[-1].low.device)
        self._addresses.copy_(addresses)
        self._count = count

    def key(self) -> Hashable:
        """Changes with the memory to choose in and the number of chosen pages.

        Prompts of different lengths share both, unless the budget is a share of the prompt. Keys, values and bounds may
        lie anywhere.
        """
        return self._count, self._memory

    def attend(self, layer: int, heads: Heads, table: DecodeTable) -> Tensor:
        """All in the dense layers, else the best pages."""
        if layer < self._dense_layers:
            return table.attend(layer, heads)
        self._attention = self._attention or PagedAttention(table, self.room, self._page, self._per)
        return self._attention.attend(layer, heads, self._addresses, self._count, table)
