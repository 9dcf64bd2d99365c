"""The numbers of a model that planning and cost formulas need; no weights, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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
        window: tokens of the sliding window, where that is what limits `max_context`.
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
    window: int | None = None

    @property
    def context_words(self) -> str:
        """What limits the context, in words for an error."""
        if self.window is not None:
            return f"a sliding window of {self.window} tokens"
        return f"a context of {self.max_context} tokens"

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


def sliding_window(config: Any) -> int | None:
    """Tokens of the sliding window that some layer of a model of this transformers configuration attends in, if any.

    Every layer of Mistral slides where a window is given, those of Qwen that are named so; LLaMA passes over the field.
    """
    named = config.model_type in ("qwen2", "qwen3") and "sliding_attention" in (config.layer_types or ())
    window = getattr(config, "sliding_window", None)
    return int(window) if window is not None and (named or config.model_type == "mistral") else None
