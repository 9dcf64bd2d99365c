"""Attention of several rows to chosen tokens of the cache and to each other, in recorded steps, and what they rate."""

from __future__ import annotations

from torch import Tensor

from harness.engine.replay.decode_table import DecodeTable
from harness.engine.step import Heads


class RowAttention:
    """Attends to listed tokens, or to all of them, and rates them by the attention they got.

    A recorded step holds the addresses of the buffers here, so the object must live as long as the step is replayed.
    """

    def __init__(self, table: DecodeTable) -> None:
        """
        Args:
            table: of the caches.
        """
        from harness.engine.kernels import row_attention, token_scores

        shape = table.shape
        self._kernel = row_attention.RowAttention(shape.heads, shape.kv_heads, shape.head_dim, table.device)
        self._scores = token_scores.token_scores
        self._norms = table.attention.norms

    def attend_all(self, layer: int, heads: Heads, table: DecodeTable) -> Tensor:
        """One row attends to all that the layer holds, as `DecodeTable.attend`."""
        out = table.attend(layer, heads)
        self._norms = table.attention.norms
        return out

    def attend(
        self, layer: int, heads: Heads, slots: Tensor, tokens: Tensor, seen: Tensor, table: DecodeTable
    ) -> Tensor:
        """Stores rows' keys and values at their slots and attends to listed tokens and to each other, by position.

        Args:
            layer, heads: of the rows.
            slots, tokens, seen: see `harness.engine.kernels.row_attention.RowAttention.attend`.
            table: of the caches.

        Returns:
            [rows, heads * head_dim].
        """
        q, k, v = heads.q, heads.k, heads.v
        out: Tensor = self._kernel.attend(q, k, v, heads.positions, slots, tokens, seen, table.rows, layer)
        self._norms = self._kernel.norms[-1]
        return out

    def rate(self, layer: int, q: Tensor, tokens: Tensor, count: Tensor, scores: Tensor, table: DecodeTable) -> None:
        """How much attention each of the tokens received from the last row, if its attention was the last to run here.

        Args:
            layer: whose attention.
            q: [heads, head_dim], the row's queries.
            tokens, count, scores: see `harness.engine.kernels.token_scores`; all tokens that the row attended to.
            table: of the caches.
        """
        self._scores(q, self._norms, table.shape.kv_heads, tokens, count, table.rows, layer, scores)
