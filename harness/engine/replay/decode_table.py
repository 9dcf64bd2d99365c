"""All layers' caches as the decode kernels see them: a table on the device, so that nothing about them is fixed.

A CUDA graph replays the same launches with the same arguments. Addresses and lengths that change from request to
request, and lengths that grow with every token, therefore live in device memory, and one recorded step serves all.
Requests that are decoded together have a row each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from harness.engine.cache import LayerCache
from harness.engine.hardware import dependent_launch
from harness.engine.shape import ModelShape
from harness.engine.step import Heads

_LENGTH = 2


class DecodeTable:
    """The caches of the requests that are being decoded, one token a step.

    Attributes:
        batch: requests at once.
        rows: [batch * layers, 3] int64, request by request, a row a layer: address of its keys, of its values, tokens
            it holds before this step.
        attention: the kernel, and the buffers that its launches share.
    """

    def __init__(self, shape: ModelShape, device: torch.device, batch: int = 1, rows: Tensor | None = None) -> None:
        """
        Args:
            shape: the model's.
            device: of its keys and values.
            batch: requests at once.
            rows: see above; new ones where there are none.
        """
        from harness.engine.kernels.decode_attention import DecodeAttention

        self.shape, self.device, self.batch = shape, device, batch
        zeros = torch.zeros((batch * shape.layers if rows is None else 0, 3), dtype=torch.int64, device=device)
        self.rows = zeros if rows is None else rows
        self.attention = DecodeAttention(
            shape.heads, shape.kv_heads, shape.head_dim, device, batch=batch, pdl=dependent_launch(device)
        )

    def load(self, caches: Sequence[LayerCache]) -> None:
        """From now on the kernels work on these caches, in the order of rows, which have room for tokens to come."""
        self.rows.copy_(_rows(caches), non_blocking=True)

    @property
    def seated(self) -> Tensor:
        """The rows of each request, [batch, layers, 3], a view."""
        return self.rows.view(self.batch, self.shape.layers, 3)

    def first(self, count: int) -> DecodeTable:
        """A table of the first so many requests alone, whose rows are these very ones."""
        return DecodeTable(self.shape, self.device, count, self.rows[: count * self.shape.layers])

    def of(self, seat: int) -> DecodeTable:
        """A table of one of the requests alone, whose rows are these very ones."""
        return DecodeTable(self.shape, self.device, 1, self.seated[seat])

    def sit(self, seat: int, caches: Sequence[LayerCache]) -> None:
        """From now on these are the caches of one of the requests."""
        self.seated[seat].copy_(_rows(caches), non_blocking=True)

    def move(self, layers: range, caches: Sequence[LayerCache]) -> None:
        """The keys and values of these layers lie elsewhere from now on."""
        rows = [caches[layer].addresses for layer in layers]
        self.rows[layers.start : layers.stop, :_LENGTH].copy_(torch.tensor(rows), non_blocking=True)

    def slide(self, most: int, token_nbytes: int) -> None:
        """Lets every cache that holds `most` tokens begin one token later, which takes `token_nbytes` of its keys."""
        full = (self.rows[:, _LENGTH:] >= most).long()
        self.rows[:, :_LENGTH] += full * token_nbytes
        self.rows[:, _LENGTH:] -= full

    def attend(self, layer: int, heads: Heads, logits: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Stores each request's token behind its cached ones of the layer and attends to all of them.

        Args:
            layer, heads: of the tokens.
            logits: see `harness.engine.kernels.decode_attention.DecodeAttention.dense`.

        Returns:
            [batch, heads * head_dim].
        """
        out: Tensor = self.attention.dense(heads.q, heads.k, heads.v, self.rows, layer, logits=logits)
        return out

    def advance(self) -> None:
        """The step is through: every layer holds one token more."""
        self.rows[:, _LENGTH] += 1


def _rows(caches: Sequence[LayerCache]) -> Tensor:
    return torch.tensor([[*cache.addresses, cache.length] for cache in caches])
