"""A dense decoder in plain fp32 matmuls, and the twin of full attention that the other twins change.

Everything is a table over all positions of the request: a token that a layer never computed, or gave up, is a hole in
that layer's table, and attention is a softmax over the whole table under a mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass
class Trace:
    """What a twin did, one entry a step; step 0 is the prefill.

    Attributes:
        logits: of the step's last row, [vocab].
        held: positions whose keys and values each layer holds after the step, in any of its KV heads.
        heads: the same for each layer and KV head.
        visible: positions that the step's last row attended to in each layer, by any of its heads.
    """

    logits: list[Tensor] = field(default_factory=list)
    held: list[list[set[int]]] = field(default_factory=list)
    heads: list[list[list[set[int]]]] = field(default_factory=list)
    visible: list[list[set[int]]] = field(default_factory=list)


def tokens_of(budget: int | float, length: int) -> int:
    """Whole numbers are tokens, up to all `length` of them; fractions are shares of `length`, rounded up."""
    if isinstance(budget, int):
        return min(budget, length)
    return min(length, math.ceil(round(budget * length, 6)))


def default_layers(depth: int) -> tuple[int, ...]:
    """Layers 10, 20 and 30 of 32, scaled."""
    return tuple(min(round(x * depth / 32), depth - 1) for x in (10, 20, 30))


def chunks(items: Sequence[T], size: int) -> list[list[T]]:
    """Consecutive runs of `size` items; the last may be shorter."""
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def best(scores: Sequence[float], count: int) -> set[int]:
    """Indexes of the `count` highest scores."""
    return set(sorted(range(len(scores)), key=lambda index: -scores[index])[:count])


def positions_of(row: Tensor) -> set[int]:
    """Where a row of truth values is true."""
    return set(row.nonzero().flatten().tolist())


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight, over the last dimension."""
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def linear(x: Tensor, layer: Any) -> Tensor:
    """X @ W^T + b."""
    out: Tensor = x @ layer.weight.T
    return out if layer.bias is None else out + layer.bias


def probabilities(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """Attention weights.

    Args:
        q: [n, heads, d].
        k: [m, kv_heads, d].
        mask: where a query may look, [n, m] or [heads, n, m] bool.

    Returns:
        [heads, n, m].
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = torch.einsum("nhd,mhd->hnm", q, k) / math.sqrt(q.shape[-1])
    return torch.softmax(scores.masked_fill(~mask, -math.inf), dim=-1)


def mix(weights: Tensor, v: Tensor) -> Tensor:
    """Values [m, kv_heads, d] under weights [heads, n, m]: [n, heads * d]."""
    v = v.repeat_interleave(weights.shape[0] // v.shape[1], dim=1)
    return torch.einsum("hnm,mhd->nhd", weights, v).flatten(1)


class Decoder:
    """The arithmetic of the LLaMA, Mistral, Qwen2 and Qwen3 families."""

    def __init__(self, model: Any) -> None:
        self.body, self.head, config = model.model, model.lm_head, model.config
        self.depth, self.heads, self.kv_heads = (
            config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads,
        )  # fmt: skip
        self.d, self.eps = config.head_dim, config.rms_norm_eps
        self.theta = float(config.rope_parameters["rope_theta"])

    def embed(self, ids: Tensor) -> Tensor:
        """[n, hidden]."""
        table: Tensor = self.body.embed_tokens.weight
        return table[ids]

    def project(self, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values before the rotation, [n, heads, d]."""
        block = self.body.layers[layer]
        x, attention = rms_norm(hidden, block.input_layernorm.weight, self.eps), block.self_attn
        q = linear(x, attention.q_proj).reshape(-1, self.heads, self.d)
        k = linear(x, attention.k_proj).reshape(-1, self.kv_heads, self.d)
        v = linear(x, attention.v_proj).reshape(-1, self.kv_heads, self.d)
        if hasattr(attention, "q_norm"):
            q, k = rms_norm(q, attention.q_norm.weight, self.eps), rms_norm(k, attention.k_norm.weight, self.eps)
        return q, k, v

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Channels c and c + d/2 of x, [n, heads, d], turned by position / theta^(2c/d)."""
        half = self.d // 2
        angle = positions[:, None].float() * self.theta ** (-torch.arange(half).float() * 2 / self.d)
        cos, sin = torch.cos(angle)[:, None], torch.sin(angle)[:, None]
        left, right = x[..., :half], x[..., half:]
        return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)

    def finish(self, layer: int, hidden: Tensor, attended: Tensor) -> Tensor:
        """Output projection and SwiGLU with their residuals, [n, hidden]."""
        block = self.body.layers[layer]
        hidden = hidden + linear(attended, block.self_attn.o_proj)
        x = rms_norm(hidden, block.post_attention_layernorm.weight, self.eps)
        gate = linear(x, block.mlp.gate_proj)
        return hidden + linear(gate * torch.sigmoid(gate) * linear(x, block.mlp.up_proj), block.mlp.down_proj)

    def logits(self, row: Tensor) -> Tensor:
        """[vocab] of one row of the last layer."""
        return linear(rms_norm(row, self.body.norm.weight, self.eps), self.head)


class Twin:
    """Full attention; the other twins override `sees`, `attend`, `enter` and `leave`."""

    def __init__(self, model: Any, prompt_len: int, total: int) -> None:
        """`total` counts the tokens of the whole request."""
        self.decoder, self.prompt_len, self.total = Decoder(model), prompt_len, total
        self.depth = self.decoder.depth
        table = (self.depth, total, self.decoder.kv_heads, self.decoder.d)
        self.raw_keys, self.keys, self.values = torch.zeros(table), torch.zeros(table), torch.zeros(table)
        self.held = torch.zeros(self.depth, total, self.decoder.kv_heads, dtype=torch.bool)
        self.trace = Trace()

    @torch.no_grad()
    def run(self, ids: Tensor) -> Trace:
        """The prompt in one step, every further id of `ids`, [total], in a step of its own."""
        self.step(torch.arange(self.prompt_len), ids[: self.prompt_len])
        for position in range(self.prompt_len, self.total):
            self.step(torch.tensor([position]), ids[position : position + 1])
        return self.trace

    def step(self, positions: Tensor, ids: Tensor) -> None:
        self.decoding = int(positions[0]) >= self.prompt_len
        self.trace.visible.append([])
        hidden = self.decoder.embed(ids)
        for layer in range(self.depth):
            hidden, positions = self.layer(layer, hidden, positions)
        self.trace.logits.append(self.decoder.logits(hidden[-1]))
        self.trace.held.append([positions_of(layer.any(1)) for layer in self.held])
        self.trace.heads.append([[positions_of(head) for head in layer.T] for layer in self.held])

    def layer(self, layer: int, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        hidden, positions = self.enter(layer, hidden, positions)
        raw_q, raw_k, v = self.decoder.project(layer, hidden)
        q = self.decoder.rotate(raw_q, positions)
        self.raw_keys[layer, positions], self.values[layer, positions] = raw_k, v
        self.keys[layer, positions] = self.decoder.rotate(raw_k, positions)
        self.held[layer, positions] = True
        mask = self.sees(layer, positions, q)
        last = mask[..., -1, :].reshape(-1, self.total).any(0)
        self.trace.visible[-1].append(positions_of(last))
        hidden = self.decoder.finish(layer, hidden, self.attend(layer, raw_q, q, positions, mask))
        return self.leave(layer, hidden, positions, q)

    def causal(self, layer: int, positions: Tensor) -> Tensor:
        """[n, total]: each row sees what the layer, in all its heads, holds of itself and the tokens before it."""
        return self.held[layer].any(1) & (torch.arange(self.total) <= positions[:, None])

    def enter(self, layer: int, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rows that this layer computes."""
        return hidden, positions

    def sees(self, layer: int, positions: Tensor, q: Tensor) -> Tensor:
        """Mask over all positions of the request, [n, total] or [heads, n, total]."""
        return self.causal(layer, positions)

    def attend(self, layer: int, raw_q: Tensor, q: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """[n, heads * d]."""
        return mix(probabilities(q, self.keys[layer], mask), self.values[layer])

    def leave(self, layer: int, hidden: Tensor, positions: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """Rows that go on to the next layer."""
        return hidden, positions
