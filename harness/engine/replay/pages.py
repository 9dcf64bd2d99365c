"""Attention of one new token to the pages of the cache that its queries rate best, in steps that may be replayed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import Tensor

from harness.engine.replay.decode_table import dependent_launch
from harness.engine.shape import ModelShape
from harness.engine.step import Heads

if TYPE_CHECKING:
    from harness.engine.kernels.decode_attention import DecodeAttention

MOST_PAGES = 32768
"""Pages of one layer that can be chosen from."""


class ResidentPages:
    """Chooses pages and attends to them, on the device alone.

    A recorded step holds the addresses of the buffers here, so the object must live as long as the step is replayed.

    Attributes:
        nbytes: bytes of the buffers.
    """

    def __init__(
        self,
        shape: ModelShape,
        table: Tensor,
        attention: DecodeAttention,
        room: int,
        page: int,
        per: Literal["query_head", "kv_head"],
    ) -> None:
        """
        Args:
            shape: the model's.
            table, attention: where the caches are and what attends to them, of `ResidentCaches`.
            room, page, per: see `ResidentCaches.pages`.
        """
        from harness.engine.kernels.page_select import PageSelect

        self._table, self._attention, self._page, device = table, attention, page, table.device
        self._select = PageSelect(
            shape.heads, shape.kv_heads, shape.head_dim, room, page, per, device, pdl=dependent_launch(device)
        )
        self.nbytes: int = self._select.nbytes

    def attend(self, layer: int, heads: Heads, bounds: Tensor, count: int) -> Tensor:
        """Stores one token's key and value, takes the key into its page's bounds and attends to the best pages.

        Args:
            layer: whose cache.
            heads: of the token.
            bounds: [layers, 2] int64, addresses of all layers' bounds, see `PageSelect.page_scores`.
            count: pages to attend to, the new token's among them, 1 to room; all of them where there are fewer.

        Returns:
            [1, heads * head_dim].
        """
        q, k, v = heads.q[0], heads.k[0], heads.v[0]
        scores = self._select.page_scores(q, k, bounds, self._table, layer)
        pages = self._select.best_pages(scores, count)
        out: Tensor = self._attention.paged(q, k, v, self._table, layer, pages, self._page)
        return out
