"""Quest's recorded decode step: pages are rated, chosen and attended to on the device."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal

import torch
from torch import Tensor

from harness.engine.cache import LayerCache
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

    def __init__(self, dense_layers: int, page: int, per: Literal["query_head", "kv_head"], seats: int = 1) -> None:
        """
        Args:
            dense_layers: first layers that read everything.
            page: tokens a page.
            per: who chooses pages.
            seats: requests at once.
        """
        self._asked, self._seats = (dense_layers, page, per), seats
        self._dense_layers, self._page, self._per = dense_layers, page, per
        self._attention: PagedAttention | None = None
        self._memory, self._tokens, self.room, self._count = object(), 0, 0, 0
        # Recorded steps find the bounds of a request by their addresses, [seats, layers, 2].
        self._addresses = torch.zeros(0, dtype=torch.int64)
        self._nobody: PageBounds | None = None

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
        self._lay(0, pages, pages[-1].low.device)
        self._pages, self._count = pages, count

    def _lay(self, seat: int, pages: Sequence[PageBounds], device: torch.device) -> None:
        addresses = torch.tensor([[layer.low.data_ptr(), layer.high.data_ptr()] for layer in pages])
        if not len(self._addresses):
            self._addresses = torch.zeros((self._seats, *addresses.shape), dtype=torch.int64, device=device)
        self._addresses[seat].copy_(addresses)

    def seats(self, count: int) -> Replay:
        """With room for as many pages as this one's request has."""
        other = QuestReplay(*self._asked, count)
        other.room, other._count = self.room, self._count
        return other

    def serves(self, other: Replay) -> bool:
        """What chooses as many pages, of no more."""
        return (
            isinstance(other, QuestReplay)
            and (other._asked, other._count) == (self._asked, self._count)
            and other.room <= self.room
        )

    def sit(self, seat: int, other: Replay | None, caches: Sequence[LayerCache], table: DecodeTable) -> None:
        """Steps find the bounds of the request's pages."""
        super().sit(seat, other, caches, table)
        pages = other._pages if isinstance(other, QuestReplay) else [self._of_nobody(caches[0])] * len(caches)
        self._lay(seat, pages, table.device)

    def _of_nobody(self, cache: LayerCache) -> PageBounds:
        """Bounds that are never read for anybody."""
        if self._nobody is None:
            self._nobody = PageBounds(self._page, self.room)
            self._nobody.update(cache.keys)
        return self._nobody

    def seated(self, table: DecodeTable) -> Sequence[Tensor]:
        """As in the base, and where bounds lie."""
        return [*super().seated(table), self._addresses]

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
        self._attention = self._attention or PagedAttention(table, self.room, self._page, self._per, self._seats)
        bounds = self._addresses[: len(heads)].flatten(0, 1)
        return self._attention.attend(layer, heads, bounds, self._count, table)
