"""Quest (Tang et al., arXiv 2406.10774): decode reads only the pages of the KV cache that may matter to the query.

The prefill is dense and everything stays in the cache. A page is 16 consecutive tokens; of its rotated keys the
channel-wise minimum m and maximum M are kept. For a query q,

    score(q, page) = sum over channels c of max(q_c m_c, q_c M_c)

is an upper bound on q . k of every key in the page. A decode step attends exactly, but only to the best pages that fit
the budget; the first two layers stay dense.

Interpretations, where the authors' two implementations differ:
- the last, possibly partial page is always attended, and counts in the budget;
- `per=query_head` (faithful) lets every query head choose its pages, so under grouped-query attention the reads of a
  group are the union of its heads' choices; `per=kv_head` rates a page by its best query head of the group;
- nothing is skipped while the cache fits the budget;
- `question=decode` is the paper's protocol: the prompt's question is fed token by token as decode steps, so that pages
  are already chosen while it is read.
"""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from harness.options import Budget, OptionSet, window_tokens
from harness.parts import part
from harness.rows import Heads, Step
from methods.base import Method
from methods.paging import PageBounds


class Quest(Method):
    """Keeps all keys and values, reads few."""

    name = "quest"
    summary = "Quest: decode attends to the best pages of the KV cache only"
    nothing = MappingProxyType({"budget": "1"})

    class Options(OptionSet):
        """Pages and how many of them."""

        budget: Budget = Field(1024, description="tokens that a decode step attends to; paper: 256 to 4096")
        page: Annotated[int, Field(ge=1)] = Field(16, description="tokens a page")
        dense_layers: Annotated[int, Field(ge=0)] = Field(2, description="first layers that read everything")
        per: Literal["query_head", "kv_head"] = Field("query_head", description="who chooses pages")
        question: Literal["prefill", "decode"] = Field("prefill", description="how the question comes in")
        question_tokens: Annotated[int, Field(ge=1)] = Field(32, description="its length where the task does not tell")

    options: Options

    def question_tokens(self, prompt_len: int, question: int) -> int:
        """The question, with `question=decode`."""
        if self.options.question == "prefill":
            return 0
        return min(question or self.options.question_tokens, prompt_len - 1)

    def begin(self, prompt_len: int, max_new_tokens: int) -> None:
        """Forgets the pages and turns the budget into tokens of this prompt."""
        super().begin(prompt_len, max_new_tokens)
        self.budget = window_tokens(self.options.budget, prompt_len, prompt_len + max_new_tokens)
        self.pages = [PageBounds(self.options.page, prompt_len + max_new_tokens) for _ in self.cache]

    def attend(self, layer: int, heads: Heads, step: Step) -> Tensor:
        """Dense in the prefill and in the first layers; pages elsewhere, chosen anew for every token."""
        if layer < self.options.dense_layers:
            return super().attend(layer, heads, step)
        if step.phase == "prefill":
            out = super().attend(layer, heads, step)
            self.pages[layer].update(self.cache[layer].keys)
            return out
        return torch.cat([self._decode(layer, row) for row in heads.single()])

    def _decode(self, layer: int, row: Heads) -> Tensor:
        cache, pages = self.cache[layer], self.pages[layer]
        cache.append(row.k, row.v, row.positions)
        pages.update(cache.keys)
        count = max(1, self.budget // self.options.page)
        if cache.length <= self.budget or count >= pages.count:
            return self.model.attention.causal(row.q, cache.keys, cache.values)
        kv_heads, head_dim = row.k.shape[1:]
        groups = row.q.view(kv_heads, -1, head_dim)
        with part("score"):
            scores = pages.scores(groups)
        if self.options.per == "kv_head":
            scores = scores.amax(1, keepdim=True)
        with part("select"):
            chosen = _best_pages(scores, count)
        return _attend_pages(groups, cache.keys, cache.values, chosen, self.options.page)

    def decode_bytes(self) -> int:
        """Chosen pages and all bounds; everything in dense layers or while it fits the budget."""
        return sum(self._read_bytes(layer) for layer in range(len(self.cache)))

    def _read_bytes(self, layer: int) -> int:
        cache = self.cache[layer]
        if layer < self.options.dense_layers or cache.length <= self.budget:
            return cache.resident_nbytes
        choosers = self.model.shape.heads // self.model.shape.kv_heads if self.options.per == "query_head" else 1
        chosen = min(cache.length, self.budget * choosers)
        return cache.resident_nbytes * chosen // cache.length + self.pages[layer].used_nbytes

    def extra_bytes(self) -> int:
        """Bytes of the pages' bounds: an eighth of the keys' bytes at 16 tokens a page."""
        return sum(pages.nbytes for pages in self.pages)


def _best_pages(scores: Tensor, count: int) -> Tensor:
    """The last page and the best others: [kv_heads, choosers, pages] -> [kv_heads, choosers, count] ascending."""
    scores = scores.clone()
    scores[..., -1] = torch.inf
    return scores.topk(count).indices.sort().values


def _attend_pages(groups: Tensor, keys: Tensor, values: Tensor, pages: Tensor, size: int) -> Tensor:
    """Exact attention of one token over chosen pages, reading nothing else.

    Args:
        groups: queries, [kv_heads, group, d].
        keys, values: [n, kv_heads, d].
        pages: [kv_heads, choosers, m], choosers being 1 (the group shares its pages) or group.
        size: tokens a page.

    Returns:
        [1, heads * d].
    """
    kv_heads, group, d = groups.shape
    choosers = pages.shape[1]
    tokens = (pages.unsqueeze(-1) * size + torch.arange(size, device=pages.device)).flatten(2)
    beyond = (tokens >= keys.shape[0]).unsqueeze(2)
    tokens = tokens.clamp(max=keys.shape[0] - 1)
    head = torch.arange(kv_heads, device=pages.device).view(-1, 1, 1)
    queries = groups.reshape(kv_heads, choosers, group // choosers, d)
    logits = (queries @ keys[tokens, head].transpose(-1, -2)).float() / math.sqrt(d)
    weights = logits.masked_fill(beyond, -torch.inf).softmax(-1).to(values.dtype)
    return (weights @ values[tokens, head]).reshape(1, -1)
