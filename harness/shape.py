"""The numbers of a model that planning and cost formulas need; no weights, no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """Shape of a decoder-only transformer with grouped-query attention.

    Attributes:
        family: "llama", "mistral", "qwen2" or "qwen3".
        layers: decoder layers.
        hidden: width of the residual stream.
        intermediate: width of the SwiGLU feed forward.
        heads: query heads.
        kv_heads: key/value heads; divides `heads`.
        head_dim: channels of one head.
        vocab: size of the vocabulary.
        max_context: most tokens (prompt plus new) at which attention is exact: the smaller of the trained context and
            the sliding window, if the model has one.
    """

    family: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_context: int

    @property
    def linear_params(self) -> int:
        """Weights of one layer's matrices: q, k, v, o and the three of SwiGLU."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """Bytes of keys and values that one token takes in one layer."""
        return 2 * self.kv_heads * self.head_dim * element_bytes
