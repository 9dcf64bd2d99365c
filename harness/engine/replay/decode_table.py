"""All layers' caches as the decode kernels see them: a table on the device, so that nothing about them is fixed.

A CUDA graph replays the same launches with the same arguments. Addresses and lengths that change from request to
request, and lengths that grow with every token, therefore live in device memory, and one recorded step serves all.
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
    """The caches of the request that is being decoded, one token a step.

    Attributes:
        rows: [layers, 3] int64, a row a layer: address of its keys, of its values, tokens it holds before this step.
        attention: the kernel, and the buffers that its launches share.
    """

    def __init__(self, shape: ModelShape, device: torch.device) -> None:
        """
        Args:
            shape: the model's.
            device: of its keys and values.
        """
        from harness.engine.kernels.decode_attention import DecodeAttention

        self.shape, self.device = shape, device
        self.rows = torch.zeros((shape.layers, 3), dtype=torch.int64, device=device)
        self.attention = DecodeAttention(
            shape.heads, shape.kv_heads, shape.head_dim, device, pdl=dependent_launch(device)
        )

    def load(self, caches: Sequence[LayerCache]) -> None:
        """From now on the kernels work on these caches, which have room for the tokens to come."""
        rows = [[cache.keys.data_ptr(), cache.values.data_ptr(), cache.length] for cache in caches]
        self.rows.copy_(torch.tensor(rows), non_blocking=True)

    def move(self, layers: range, caches: Sequence[LayerCache]) -> None:
        """The keys and values of these layers lie elsewhere from now on."""
        rows = [[caches[layer].keys.data_ptr(), caches[layer].values.data_ptr()] for layer in layers]
        self.rows[layers.start : layers.stop, :_LENGTH].copy_(torch.tensor(rows), non_blocking=True)

    def slide(self, most: int, token_nbytes: int) -> None:
        """Lets every cache that holds `most` tokens begin one token later, which takes `token_nbytes` of its keys."""
        full = (self.rows[:, _LENGTH:] >= most).long()
        self.rows[:, :_LENGTH] += full * token_nbytes
        self.rows[:, _LENGTH:] -= full

    def attend(self, layer: int, heads: Heads, logits: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Stores one token's key and value behind the layer's cached ones and attends to all of them.

        Args:
            layer, heads: of the token.
            logits: see `harness.engine.kernels.decode_attention.DecodeAttention.dense`.

        Returns:
            [1, heads * head_dim].
        """
        q, k, v = heads.q[0], heads.k[0], heads.v[0]
        out: Tensor = self.attention.dense(q, k, v, self.rows, layer, logits=logits)
        return out

    def advance(self) -> None:
        """The step is through: every layer holds one token more."""
        self.rows[:, _LENGTH] += 1
