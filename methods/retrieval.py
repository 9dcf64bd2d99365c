"""RetrievalAttention (Liu et al., arXiv 2409.10516): decode searches the middle of the context in host memory.

The prefill is dense. Of the prompt, the first and the last tokens stay on the device, and all that follow; the keys and
values between them lie on the host, in an index for each KV head. For every new token, each query head attends to what
is on the device and to the keys of the index that match it best. Both softmaxes are joined by their denominators, so
the result is exact attention to the union.

Interpretations:
- the index is a flat one, searched whole: it returns the exact best keys, as the authors' public code does by default
  (the paper's graph finds nearly those with fewer products). Building it is copying it, which counts in TTFT;
- a question behind the prompt comes in token by token;
- host memory also holds the tokens that stay on the device, which is a copy of a few hundred;
- the device attends to its part while the host searches; what a step then waits for is the search.
"""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from harness.engine.cache import LayerCache
from harness.engine.method import Method
from harness.engine.replay.replay import Replay
from harness.engine.step import Heads, Step
from harness.options import Budget, OptionSet, budget_tokens, window_tokens
from methods.common.offloading import Offloading
from methods.common.scores import head_dots
from methods.common.sinks import both_ends


class Retrieval(Offloading):
    """Keeps everything, the middle of it on the host, where it is searched."""

    name = "retrieval"
    summary = "RetrievalAttention: decode attends to both ends and to what it finds of the middle, in host memory"
    nothing = MappingProxyType({"recent": "1"})

    class Options(OptionSet):
        """What stays on the device, and how much is found."""

        sinks: Annotated[int, Field(ge=0)] = Field(128, description="first tokens on the device; authors' code: 128")
        recent: Budget = Field(512, description="last prompt tokens on the device; authors' code: 512")
        topk: Budget = Field(2000, description="tokens that each query head finds; authors' code: 2000")

    options: Options

    def host_layers(self) -> range:
        """All."""
        return range(self.model.shape.layers)

    def begin(self, prompt_len: int, max_new_tokens: int) -> None:
        """Says which tokens are to be searched, if any."""
        super().begin(prompt_len, max_new_tokens)
        recent = window_tokens(self.options.recent, prompt_len, prompt_len + max_new_tokens)
        self._far = slice(self.options.sinks, max(self.options.sinks, prompt_len - recent))
        self._count = min(budget_tokens(self.options.topk, prompt_len), self._far.stop - self._far.start)
        self._near = [LayerCache(cache.spare, cache.most) for cache in self.cache]
        if not self._count:
            for store in self.stores.values():
                store.release()

    def end(self) -> None:
        """Frees what is on the device, too."""
        super().end()
        for near in self._near:
            near.reset()

    def attend(self, layer: int, heads: Heads, step: Step) -> Tensor:
        """Dense in the prefill, which sends keys and values to the host; then searches for every token."""
        if not self._count:
            return Method.attend(self, layer, heads, step)
        if step.phase == "decode":
            return torch.cat([self._decode(layer, row) for row in heads.single()])
        out = super().attend(layer, heads, step)
        index = both_ends(heads.positions, self._far.start, len(heads) - self._far.stop)
        self._near[layer].append(heads.k[index], heads.v[index], heads.positions[index])
        return out

    def _decode(self, layer: int, row: Heads) -> Tensor:
        near, far = self._near[layer], self.cache[layer]
        near.append(row.k, row.v, row.positions)
        wanted = row.q.to(far.keys.device)  # waits for the queries; from here on both sides work
        parts = [softmax_part(row.q, near.keys, near.values, near.length)]
        found = softmax_part(wanted, far.keys[self._far], far.values[self._far], self._count)
        parts.append((found[0].to(row.q.device), found[1].to(row.q.device)))
        outs, norms = (torch.stack(each) for each in zip(*parts, strict=True))
        joined = (norms.softmax(0).unsqueeze(-1) * outs).sum(0)
        return joined.to(row.q.dtype).view(1, -1)

    def replay(self) -> Replay | None:
        """Only where nothing is searched: the host takes part in every other step."""
        return None if self._count else self.dense_replay

    def kv_bytes(self) -> int:
        """Bytes of both ends and of new tokens."""
        return sum(near.nbytes for near in self._near) if self._count else Method.kv_bytes(self)

    def decode_bytes(self) -> int:
        """What is on the device, all keys that are searched and the values that are found, wherever they lie."""
        if not self._count:
            return super().decode_bytes()
        return sum(near.resident_nbytes for near in self._near) + self._searched_bytes() + self._found_bytes()

    def _searched_bytes(self) -> int:
        return sum(cache.keys[self._far].nbytes for cache in self.cache)

    def _found_bytes(self) -> int:
        values = self.cache[0].values
        return len(self.cache) * self._count * self.model.shape.heads * values.shape[2] * values.element_size()

    def notes(self) -> dict[str, Any]:
        """Bytes of keys that every step searches."""
        return {"searched_bytes": self._searched_bytes()} if self._count else {}


def softmax_part(q: Tensor, k: Tensor, v: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Attention of one token to the `count` keys that match each head best, and what it takes to join it with more.

    Args:
        q: [1, heads, d].
        k, v: [n, kv_heads, d].
        count: up to n.

    Returns:
        [heads, d] float32, and the log of each softmax's denominator, [heads] float32.
    """
    logits = head_dots(q, k)[:, 0].float() / math.sqrt(q.shape[2])
    group = q.shape[1] // k.shape[1]
    if count == len(k):
        values = v.transpose(0, 1).repeat_interleave(group, 0)
    else:
        logits, index = logits.topk(count)
        values = v[index, torch.arange(q.shape[1], device=v.device).unsqueeze(1) // group]
    norms = logits.logsumexp(1)
    return ((logits - norms.unsqueeze(1)).exp().unsqueeze(1) @ values.float())[:, 0], norms
