"""The staged forward pass: own prefill and decode loops over the layers of a stock transformers model.

A prompt's prefill is bound by arithmetic (every weight meets every row), a decode step by memory traffic (all weights
and the resident keys and values are read for one row). Pruning rows therefore shortens the first, and pruning keys and
values the second. The engine runs three verbs a layer (project, attend, feed forward) and lets a method act at the
hooks of `methods.base.Method`; it knows no method by name, and the base class gives exactly the stock model's logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.attention import Attention
from harness.parts import part
from harness.rotary import Rotary
from harness.rows import Heads, Rows, Step
from harness.shape import ModelShape
from methods.base import Method, ModelContext


@dataclass(frozen=True)
class Request:
    """What one generation is asked to do.

    Attributes:
        prompt: [n] int64 token ids on the model's device, n >= 1.
        max_new_tokens: where generation stops at the latest, >= 1.
        stop_ids: tokens that end generation (they are part of the output).
        min_new_tokens: stop tokens are suppressed before this many tokens are out.
        question: last tokens of the prompt that hold the question; 0 if that is not known.
        question_after: prefill, and prune, the context alone; the question follows in one step and is never pruned.
    """

    prompt: Tensor
    max_new_tokens: int
    stop_ids: frozenset[int] = frozenset()
    min_new_tokens: int = 0
    question: int = 0
    question_after: bool = False

    def __post_init__(self) -> None:
        if self.prompt.numel() < 1:
            raise ValueError("the prompt is empty")
        if not 0 <= self.question < self.prompt.numel():
            raise ValueError(f"a question of {self.question} tokens leaves no context")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")

    def late_tokens(self, method: Method) -> int:
        """Last tokens of the prompt that follow the prefill: its question, if protocol or method want that."""
        if self.question_after:
            return self.question
        return method.question_tokens(len(self.prompt), self.question)


@dataclass(frozen=True)
class Work:
    """How many rows each layer of the last prefill really computed, for cost formulas.

    Attributes:
        projected: rows a layer that went through norm and q/k/v.
        fed: rows a layer that went through output projection and MLP.
    """

    projected: list[int]
    fed: list[int]


class Engine:
    """Runs requests through a model under a method, one request at a time, greedily."""

    def __init__(self, model: Any, shape: ModelShape, attention: Attention | None = None) -> None:
        """
        Args:
            model: a `*ForCausalLM` of one of the supported families, in eval mode.
            shape: its shape.
            attention: the kernel that all methods share.
        """
        body = model.model
        self.layers, self.embed, self.norm, self.lm_head = body.layers, body.embed_tokens, body.norm, model.lm_head
        self.rotary = Rotary(body.rotary_emb)
        self.head_dim = shape.head_dim
        self.work = Work([], [])
        tied = model.lm_head.weight is body.embed_tokens.weight
        self.decode_weight_bytes = sum(p.nbytes for p in model.parameters()) - (0 if tied else self.embed.weight.nbytes)
        self.context = ModelContext(shape, attention or Attention(), self.rotary)

    @torch.inference_mode()
    def stream(self, method: Method, request: Request) -> Iterator[int]:
        """Generates greedily and yields each new token id once it is on the host.

        The first `next` is the prefill (TTFT), each later one a decode step (TPOT).
        """
        logits, position = self.read(method, request)
        for count in range(1, request.max_new_tokens + 1):
            token = _greedy(logits, request.stop_ids if count <= request.min_new_tokens else frozenset())
            token_id = int(token)
            yield token_id
            if token_id in request.stop_ids or count == request.max_new_tokens:
                return
            logits = self.forward(method, token, Step("decode", position, 1))
            position += 1

    def read(self, method: Method, request: Request) -> tuple[Tensor, int]:
        """Takes in prompt and question; returns the last row's logits and the next token's position."""
        late = request.late_tokens(method)
        context, question = request.prompt.tensor_split([len(request.prompt) - late])
        context = method.prompt(context)
        method.begin(len(context), late + request.max_new_tokens)
        logits, position = self.forward(method, context, Step("prefill", 0, len(context))), len(context)
        for piece in (question,) if request.question_after else question.unsqueeze(1):
            logits = self.forward(method, piece, Step("decode", position, len(piece)))
            position += len(piece)
        return logits, position

    @torch.inference_mode()
    def forward(self, method: Method, ids: Tensor, step: Step) -> Tensor:
        """Brings `step.count` tokens in, behind those that the method's caches hold.

        Args:
            ids: [step.count] int64.

        Returns:
            Logits of the last row, [vocab].
        """
        positions = torch.arange(step.start, step.start + step.count, device=ids.device)
        rows = Rows(self.embed(ids), positions)
        work = Work([], [])
        for layer in range(len(self.layers)):
            work.projected.append(len(rows))
            with part("project"):
                heads = self.project(layer, rows, rotated=method.rotated)
            with part("attention"):
                rows = rows.with_attended(method.attend(layer, heads, step))
            rows = method.after_attention(layer, rows, heads, step)
            work.fed.append(len(rows))
            with part("feed forward"):
                rows = self.feed_forward(layer, rows)
            rows = method.after_layer(layer, rows, heads, step)
        if step.phase == "prefill":
            self.work = work
        return self.logits(rows)

    def project(self, layer: int, rows: Rows, *, rotated: bool) -> Heads:
        """First verb: norm, q/k/v projections, the family's head norms, rotary positions."""
        block = self.layers[layer]
        attention, hidden = block.self_attn, block.input_layernorm(rows.hidden)
        q, k, v = (self._split(linear(hidden)) for linear in (attention.q_proj, attention.k_proj, attention.v_proj))
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        if rotated:
            q, k = self.rotary(q, rows.positions), self.rotary(k, rows.positions)
        return Heads(q, k, v, rows.positions)

    def feed_forward(self, layer: int, rows: Rows) -> Rows:
        """Third verb: output projection, norm, MLP, for the rows that are still there."""
        block = self.layers[layer]
        hidden = rows.hidden + block.self_attn.o_proj(rows.attended)
        hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
        return Rows(hidden, rows.positions)

    def logits(self, rows: Rows) -> Tensor:
        """Logits of the last row alone, [vocab]."""
        last: Tensor = self.lm_head(self.norm(rows.hidden[-1:]))
        return last[0]

    def _split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], -1, self.head_dim)


def _greedy(logits: Tensor, suppressed: frozenset[int]) -> Tensor:
    if suppressed:
        logits = logits.clone()
        logits[list(suppressed)] = -torch.inf
    return logits.argmax().unsqueeze(0)
