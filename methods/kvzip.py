"""KVzip (Kim et al., arXiv 2505.23416): what the model looks at when it has to repeat the context.

Behind a dense prefill the context is read again in chunks, each behind a request to repeat it, with all keys and values
there. A cached token of the chunk is worth the most attention that any of these rows pays to it, by any query head of
its KV head, where a row sees the first tokens, the chunk in the cache, and what is read before it. Then the best of all
layers, heads and tokens together stay. No question has a say in it, so `--question after` is its home.

What is read again counts in TTFT, which so becomes two to three times that of a dense prefill.

Interpretations:
- attention is float32 (the authors' code: the model's precision), and of equal scores the earlier layer's, head's and
  token's stays;
- `budget` is the mean over layers and heads; the first `sinks` tokens stay in every head, of the budget;
- the request stands as plain text without a chat template's turn around it; where a model has no tokenizer, the chunk
  alone is read;
- what is read again has the positions behind the context; theirs may exceed what the model was trained for;
- `plus=true` is KVzip+ (Jégou and Jeblick, arXiv 2601.07891): attention counts times the L2 norm of what the value adds
  to the residual stream, W_O v of the query head that pays it. kvpress also divides by the norm of the row that pays,
  behind the layer's own normalisation, which is about the same for all rows of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from harness.engine.method import Hook, Method, ModelContext
from harness.engine.ragged import RaggedCache
from harness.engine.replay.ragged import RaggedReplay
from harness.engine.replay.replay import Replay
from harness.engine.step import Heads, Step
from harness.options import Budget, OptionSet
from methods.common.evicting import Evicting
from methods.common.scores import head_dots

_FIRST = "\n\nRepeat the previous context exactly."
_LATER = "\n\nRepeat the part of the previous context exactly, starting with "
_OVERLAP = 8
"""Tokens before a chunk that a later request quotes."""
_ROWS = 128
"""Rows whose attention is there at a time."""


class KVzip(Evicting):
    """Keeps what it takes to repeat the context."""

    name = "kvzip"
    summary = "KVzip: keys and values that the model looks at when it repeats the context, over all layers and heads"
    parallel = True
    stays = "sinks"

    class Options(Evicting.Options):
        """How much, and in which pieces it is repeated."""

        budget: Budget = Field(0.3, description="prompt tokens that KV heads keep in the mean; paper: 0.3")
        sinks: Annotated[int, Field(ge=1)] = Field(4, description="first tokens that always stay; paper: 4")
        chunk: Annotated[int, Field(ge=1)] = Field(2000, description="tokens that are repeated at a time; paper: 2000")
        plus: bool = Field(False, description="weigh attention by what values add to the output: KVzip+")

    options: Options

    def __init__(self, options: OptionSet, model: ModelContext) -> None:
        """As `Method`."""
        super().__init__(options, model)
        self._replay = RaggedReplay()

    def begin(self, prompt_len: int, max_new_tokens: int) -> None:
        """Nothing was repeated yet."""
        super().begin(prompt_len, max_new_tokens)
        self._scores: list[Tensor] = []

    def probes(self, ids: Tensor) -> Iterator[Tensor]:
        """Every chunk behind its request; at the end forgets what was looked at least."""
        if self.tokens >= len(ids):
            return
        for start in range(0, len(ids), self.options.chunk):
            self._part = slice(start, start + self.options.chunk)
            yield torch.cat((self._request(ids[:start]), ids[self._part]))
        self._forget(len(ids))

    def _request(self, before: Tensor) -> Tensor:
        """Asks to repeat what follows these tokens, which a request for a later chunk quotes the last of."""
        asked = before.new_tensor(self.model.encode(_LATER if len(before) else _FIRST))
        return torch.cat((asked, before[-_OVERLAP:]))

    def prefill_hooks(self, layer: int) -> Collection[Hook]:
        """None: the prompt comes in under full attention."""
        return ()

    def attend(self, layer: int, heads: Heads, step: Step) -> Tensor:
        """Attends to everything; what is read again is not stored, but scored."""
        if step.phase != "probe":
            return Method.attend(self, layer, heads, step)
        cache = self.cache[layer]
        with self.model.part("score"):
            self._rate(layer, heads, step.start)
        keys, values = torch.cat((cache.keys, heads.k)), torch.cat((cache.values, heads.v))
        return self.model.attention.causal(heads.q, keys, values)

    def _rate(self, layer: int, heads: Heads, prompt_len: int) -> None:
        if len(self._scores) == layer:
            self._scores.append(torch.full((heads.k.shape[1], prompt_len), torch.inf, device=heads.k.device))
        sinks, cache = self.options.sinks, self.cache[layer]
        part = slice(max(self._part.start, sinks), min(self._part.stop, prompt_len))
        if part.start >= part.stop:
            return
        paid = peaks(heads.q, cache.keys[:sinks], cache.keys[part], heads.k)
        if self.options.plus:
            paid *= head_output_norms(cache.values[part], self.model.out_weight(layer))
        self._scores[layer][:, part] = paid.view(heads.k.shape[1], -1, paid.shape[1]).amax(1)

    def _forget(self, prompt_len: int) -> None:
        """Keeps the best of all layers and heads, in memory of their own."""
        with self.model.part("select"):
            scores = self.model.ranks.gather(torch.stack(self._scores), 1)
            kept = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
            best = scores.flatten().sort(stable=True, descending=True).indices
            kept[best[: self.tokens * scores.shape[0] * scores.shape[1]]] = True
        self._scores.clear()
        for layer, heads in enumerate(self.model.ranks.own(kept.view(scores.shape), 1)):
            with self.model.part("gather"):
                self.cache[layer] = RaggedCache.of(self.cache[layer], [own.nonzero().flatten() for own in heads])

    def replay(self) -> Replay:
        """Every new token attends to all that each head has left."""
        return self._replay if isinstance(self.cache[0], RaggedCache) else self.dense_replay

    def asked_share(self, prompt_len: int) -> float:
        """The budget's, or that of the sinks where they are more."""
        self.begin(prompt_len, 1)
        return min(self.tokens, prompt_len) / prompt_len

    def tokens_requested(self) -> list[int]:
        """What the joint budget comes to in each layer, rounded up; more in one is fewer in another."""
        return [math.ceil(kept) for kept in self.tokens_kept()]


def peaks(q: Tensor, sinks: Tensor, chunk: Tensor, k: Tensor) -> Tensor:
    """The most attention that a token of a chunk gets from any row that repeats it: [heads, tokens] float32.

    Args:
        q: the repeating rows', [m, heads, d].
        sinks, chunk: cached keys that all rows see, [tokens, kv_heads, d].
        k: the repeating rows', [m, kv_heads, d]; each sees those up to its own.
    """
    best = torch.zeros(q.shape[1], len(chunk), device=k.device)
    before, place = torch.cat((sinks, chunk)), torch.arange(len(k), device=k.device)
    for begin in range(0, len(q), _ROWS):
        rows, own = q[begin : begin + _ROWS], k[: begin + _ROWS]
        logits = head_dots(rows, torch.cat((before, own))).float() / math.sqrt(q.shape[2])
        future = place[: len(own)] > place[begin : begin + len(rows)].unsqueeze(1)
        logits[:, :, len(before) :].masked_fill_(future, -torch.inf)
        best = torch.maximum(best, logits.softmax(-1)[:, :, len(sinks) : len(before)].amax(1))
    return best


def head_output_norms(v: Tensor, weight: Tensor) -> Tensor:
    """L2 norm of what each value adds to the residual stream through each query head: [heads, n] float32.

    By |W v|^2 = v . (W^T W) v, so that a token costs d^2 operations a head and not hidden * d.

    Args:
        v: [n, kv_heads, d].
        weight: of the layer's output projection, [hidden, heads * d].
    """
    parts = weight.float().view(len(weight), -1, v.shape[2]).transpose(0, 1)
    values = v.float().repeat_interleave(len(parts) // v.shape[1], 1).transpose(0, 1)
    return ((values @ (parts.transpose(1, 2) @ parts)) * values).sum(-1).clamp(min=0).sqrt()
