"""All layers' caches as the decode kernels see them: a table on the device, so that nothing about them is fixed.

A CUDA graph replays the same launches with the same arguments. Addresses and lengths that change from request to
request, and lengths that grow with every token, therefore live in device memory, and one captured step serves all.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from harness.engine.cache import LayerCache
from harness.engine.replay.overlap import Overlap
from harness.engine.shape import ModelShape
from harness.engine.step import Heads

if TYPE_CHECKING:
    from harness.engine.kernels.row_attention import RowAttention
    from harness.engine.replay.pages import ResidentPages

_LENGTH = 2


def dependent_launch(device: torch.device) -> bool:
    """Whether kernels of one stream may overlap their start (programmatic dependent launch: Hopper and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


class ResidentCaches:
    """The caches of the request that is being decoded, one token a step.

    Attributes:
        table: [layers, 3] int64, a row a layer: address of its keys, of its values, tokens it holds before this step.
        norms: [heads] float32: the log of the softmax denominators, base 2, of the last row that attended to tokens.
        overlap: marks of the step that is being launched, if something runs beside it.
    """

    def __init__(self, shape: ModelShape, device: torch.device) -> None:
        """
        Args:
            shape: the model's.
            device: of its keys and values.
        """
        from harness.engine.kernels.decode_attention import DecodeAttention

        self._shape = shape
        self._rows: RowAttention | None = None
        self.table = torch.zeros((shape.layers, 3), dtype=torch.int64, device=device)
        self._attention = DecodeAttention(
            shape.heads, shape.kv_heads, shape.head_dim, device, pdl=dependent_launch(device)
        )
        self.norms = self._attention.norms

        cuda: Any = torch.cuda
        self._side = cuda.Stream(device) if device.type == "cuda" else None
        self.overlap: Overlap | None = None

    def load(self, caches: Sequence[LayerCache]) -> None:
        """From now on the kernels work on these caches, which have room for the tokens to come."""
        rows = [[cache.keys.data_ptr(), cache.values.data_ptr(), cache.length] for cache in caches]
        self.table.copy_(torch.tensor(rows), non_blocking=True)

    def attend(self, layer: int, heads: Heads) -> Tensor:
        """Stores one token's key and value behind the layer's cached ones and attends to all of them.

        Returns:
            [1, heads * head_dim].
        """
        out: Tensor = self._attention.dense(heads.q[0], heads.k[0], heads.v[0], self.table, layer)
        self.norms = self._attention.norms
        return out

    def attend_rows(self, layer: int, heads: Heads, slots: Tensor, tokens: Tensor, seen: Tensor) -> Tensor:
        """Stores rows' keys and values at their slots and attends to chosen tokens and to each other, by position.

        Args:
            layer, heads: of the rows.
            slots, tokens, seen: see `harness.engine.kernels.row_attention.RowAttention.attend`.

        Returns:
            [rows, heads * head_dim].
        """
        from harness.engine.kernels.row_attention import RowAttention

        shape, q, k, v = self._shape, heads.q, heads.k, heads.v
        if self._rows is None:
            self._rows = RowAttention(shape.heads, shape.kv_heads, shape.head_dim, self.table.device)
        out: Tensor = self._rows.attend(q, k, v, heads.positions, slots, tokens, seen, self.table, layer)
        self.norms = self._rows.norms[-1]
        return out

    def token_scores(self, layer: int, q: Tensor, tokens: Tensor, count: Tensor, scores: Tensor) -> Tensor:
        """How much attention each of the tokens received from the last row, if this attention was the last to run.

        Args:
            layer: whose attention.
            q: [heads, head_dim], the row's queries.
            tokens, count, scores: see `harness.engine.kernels.token_scores`; all tokens that the row attended to.
        """
        from harness.engine.kernels.token_scores import token_scores

        return token_scores(q, self.norms, self._shape.kv_heads, tokens, count, self.table, layer, scores)

    def move(self, layers: range, caches: Sequence[LayerCache]) -> None:
        """The keys and values of these layers lie elsewhere from now on."""
        rows = [[caches[layer].keys.data_ptr(), caches[layer].values.data_ptr()] for layer in layers]
        self.table[layers.start : layers.stop, :_LENGTH].copy_(torch.tensor(rows), non_blocking=True)

    def pages(self, room: int, page: int, per: Literal["query_head", "kv_head"]) -> ResidentPages:
        """Attention to chosen pages; one object serves all layers, one after the other.

        Args:
            room: pages to choose from, at most, 1 to `harness.engine.replay.pages.MOST_PAGES`.
            page: tokens a page.
            per: who chooses: every query head, or all query heads of a KV head together, by the best of them.
        """
        from harness.engine.replay.pages import ResidentPages

        return ResidentPages(self._shape, self.table, self._attention, room, page, per)

    def fetch(self, layer: int, source: Tensor, addresses: Tensor, like: Tensor, block: int) -> None:
        """Copies blocks into the layer's cache, see `harness.engine.kernels.fetch.fetch_blocks`."""
        from harness.engine.kernels.fetch import fetch_blocks

        fetch_blocks(source, addresses, like, self.table, layer, block)

    def aside(self, *inputs: Tensor) -> AbstractContextManager[Any]:
        """Work inside runs beside the rest of the step, and is done when the step is.

        Args:
            inputs: what it reads that may be freed meanwhile.
        """
        if self._side is None:
            return nullcontext()
        for tensor in inputs:
            tensor.record_stream(self._side)
        self.overlap = self.overlap or Overlap(self._side)
        return self.overlap.beside()

    def end_step(self) -> Overlap | None:
        """Waits for what runs aside, and returns its marks; every layer holds one token more."""
        overlap, self.overlap = self.overlap, None
        if overlap is not None:
            overlap.join()
        self.table[:, _LENGTH] += 1
        return overlap
