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
    def project_params(self) -> int:
        """Weights that a row meets before a layer's attention: q, k and v."""
        return self.hidden * self.head_dim * (self.heads + 2 * self.kv_heads)

    @property
    def feed_params(self) -> int:
        """Weights that a row meets behind a layer's attention: o and the three of SwiGLU."""
        return self.hidden * (self.heads * self.head_dim + 3 * self.intermediate)

    @property
    def linear_params(self) -> int:
        """Weights of one layer's matrices: q, k, v, o and the three of SwiGLU."""
        return self.project_params + self.feed_params

    @property
    def head_params(self) -> int:
        """Weights of the matrix that turns the last row into logits."""
        return self.hidden * self.vocab

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """Bytes of keys and values that one token takes in one layer."""
        return 2 * self.kv_heads * self.head_dim * element_bytes
