"""Attention of new tokens, one a request, to the pages that their queries rate best, in recorded steps."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from harness.engine.hardware import dependent_launch
from harness.engine.replay.decode_table import DecodeTable
from harness.engine.step import Heads

MOST_PAGES = 32768
"""Pages of one layer that can be chosen from."""


class PagedAttention:
    """Chooses pages and attends to them, on the device alone; one object serves all layers, one after the other.

    A recorded step holds the addresses of the buffers here, so the object must live as long as the step is replayed.

    Attributes:
        nbytes: bytes of the buffers.
    """

    def __init__(
        self, table: DecodeTable, room: int, page: int, per: Literal["query_head", "kv_head"], requests: int = 1
    ) -> None:
        """
        Args:
            table: of the caches.
            room: pages to choose from, at most, 1 to `MOST_PAGES`.
            page: tokens a page.
            per: who chooses: every query head, or all query heads of a KV head together, by the best of them.
            requests: at once, at most.
        """
        from harness.engine.kernels.page_select import PageSelect

        shape, device, self._page = table.shape, table.device, page
        self._select = PageSelect(
            shape.heads, shape.kv_heads, shape.head_dim, room, page, per, device,
            batch=requests, pdl=dependent_launch(device),
        )  # fmt: skip
        self.nbytes: int = self._select.nbytes

    def attend(self, layer: int, heads: Heads, bounds: Tensor, count: int, table: DecodeTable) -> Tensor:
        """Stores each token's key and value, takes the key into its page's bounds and attends to the best pages.

        Args:
            layer: whose cache.
            heads: of the tokens.
            bounds: [requests * layers, 2] int64, addresses of all layers' bounds, see `PageSelect.page_scores`.
            count: pages to attend to, the new token's among them, 1 to room; all of them where there are fewer.
            table: of the caches.

        Returns:
            [requests, heads * head_dim].
        """
        q, k, v = heads.q, heads.k, heads.v
        scores = self._select.page_scores(q, k, bounds, table.rows, layer)
        pages = self._select.best_pages(scores, count)
        out: Tensor = table.attention.paged(q, k, v, table.rows, layer, pages, self._page)
        return out
