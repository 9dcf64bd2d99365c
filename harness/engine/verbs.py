"""What a decoder layer does before and after its attention, through the model's own modules.

Two verbs a layer: project (norm, q/k/v, rotary positions) and feed forward (output projection, norm, MLP), and the
logits behind the last one. These give exactly the stock model's numbers; `harness.engine.fused` computes the same
faster.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from harness.engine.parallel import ALONE, Ranks
from harness.engine.rotary import Rotary
from harness.engine.shape import ModelShape
from harness.engine.step import Heads, Rows


class Verbs:
    """The stock modules, one after the other."""

    kind = "stock"

    def __init__(self, model: Any, shape: ModelShape, ranks: Ranks = ALONE) -> None:
        """
        Args:
            model: a `*ForCausalLM` of one of the supported families, in eval mode.
            shape: its shape.
            ranks: that hold the rest of it, where it is one rank's part.
        """
        self.layers, self.norm, self.lm_head = model.model.layers, model.model.norm, model.lm_head
        self.rotary = Rotary(model.model.rotary_emb)
        self.shape, self.ranks = shape, ranks
        self._cut_head = len(model.lm_head.weight) < len(model.model.embed_tokens.weight)

    def project(self, layer: int, rows: Rows) -> Heads:
        """Queries, keys and values: norm, projections, the family's head norms, rotary positions."""
        block = self.layers[layer]
        attention, hidden = block.self_attn, block.input_layernorm(rows.hidden)
        q, k, v = (self._split(linear(hidden)) for linear in (attention.q_proj, attention.k_proj, attention.v_proj))
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        q, k = self.rotary(q, rows.positions), self.rotary(k, rows.positions)
        return Heads(q, k, v, rows.positions)

    def feed_forward(self, layer: int, rows: Rows) -> Rows:
        """Output projection, norm and MLP, for the rows that are still there."""
        block = self.layers[layer]
        hidden = rows.hidden + self.ranks.sum_(block.self_attn.o_proj(rows.attended))
        hidden = hidden + self.ranks.sum_(block.mlp(block.post_attention_layernorm(hidden)))
        return Rows(hidden, rows.positions)

    def logits(self, rows: Rows) -> Tensor:
        """Logits of the last row alone, [vocab]."""
        return self._all_ranks(self.lm_head(self.norm(rows.hidden[-1:])))[0]

    def all_logits(self, rows: Rows) -> Tensor:
        """Logits of every row, [n, vocab]."""
        return self._all_ranks(self.lm_head(self.norm(rows.hidden)))

    def out_weight(self, layer: int) -> Tensor:
        """Of a layer's output projection, [hidden, heads * head_dim]."""
        weight: Tensor = self.layers[layer].self_attn.o_proj.weight
        return weight

    def _all_ranks(self, logits: Tensor) -> Tensor:
        """Of the whole vocabulary, [n, vocab]."""
        return self.ranks.gather(logits, 1) if self._cut_head else logits

    def _split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], -1, self.shape.head_dim)
