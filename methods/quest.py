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
- a budget of one or two pages is taken at its word; the authors' code never reads fewer than three;
- `question=decode` is the paper's protocol: the prompt's question is fed token by token as decode steps, so that pages
  are already chosen while it is read;
- `offload=host` is this project's addition, the paper keeps everything on the GPU: keys and values of the layers that
  read pages move to pinned host memory during the prefill, and only the bounds of their pages stay on the device. What
  is attended to is the same. Kernels read the chosen pages over the bus where they lie and store the new token there;
  without kernels the host gathers the chosen pages and sends those.
"""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from harness.engine.method import Method, ModelContext
from harness.engine.replay.pages import MOST_PAGES
from harness.engine.replay.replay import Replay
from harness.engine.step import Heads, Rows, Step
from harness.options import Budget, OptionSet, window_tokens
from methods.common.host_store import HostStore
from methods.common.leaving import Leaving
from methods.common.paging import PageBounds
from methods.replay.quest import QuestReplay


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
        offload: Literal["none", "host"] = Field("none", description="where keys and values that pages choose from lie")

    options: Options

    def __init__(self, options: OptionSet, model: ModelContext) -> None:
        super().__init__(options, model)
        self.pages: list[PageBounds] = []
        self._replay = QuestReplay(self.options.dense_layers, self.options.page, self.options.per)
        paged = range(self.options.dense_layers, model.shape.layers) if self.options.offload == "host" else ()
        self._stores = {layer: HostStore("async") for layer in paged}
        self._leaving = Leaving(self._stores)

    def question_tokens(self, prompt_len: int, question: int) -> int:
        """The question, with `question=decode`."""
        if self.options.question == "prefill":
            return 0
        return min(question or self.options.question_tokens, prompt_len - 1)

    def begin(self, prompt_len: int, max_new_tokens: int) -> None:
        """Forgets the pages and turns the budget into tokens, and pages, of this prompt."""
        super().begin(prompt_len, max_new_tokens)
        total, page = prompt_len + max_new_tokens, self.options.page
        self.budget = window_tokens(self.options.budget, prompt_len, total)
        self.count, needed = max(1, self.budget // page), -(-total // page)
        self._fits = total <= self.budget or needed <= self.count
        self.pages = [PageBounds(page, needed) for _ in self.cache]
        self._replay.make_room(total)
        self._leaving.begin()

    def end(self) -> None:
        """Frees the bounds too."""
        super().end()
        self.pages = []

    def attend(self, layer: int, heads: Heads, step: Step) -> Tensor:
        """Dense in the prefill and in the first layers; pages elsewhere, chosen anew for every token."""
        if layer < self.options.dense_layers:
            return super().attend(layer, heads, step)
        if step.phase == "prefill":
            self._leaving.settle(self.cache, but=1)
            out = super().attend(layer, heads, step)
            self.pages[layer].update(self.cache[layer].keys)
            self._leaving.send(layer, self.cache[layer])
            return out
        return torch.cat([self._decode(layer, row) for row in heads.single()])

    def after_layer(self, layer: int, rows: Rows, heads: Heads, step: Step) -> Rows:
        """Changes no row; at the end of the prefill the last keys and values leave the device."""
        if step.phase == "prefill" and layer == len(self.cache) - 1:
            self._leaving.settle(self.cache, but=0)
        return rows

    def _decode(self, layer: int, row: Heads) -> Tensor:
        cache, pages = self.cache[layer], self.pages[layer]
        cache.append(row.k, row.v, row.positions)
        pages.update(cache.keys)
        if cache.length <= max(self.budget, self.count * self.options.page):
            return self.model.attention.causal(row.q, cache.keys.to(row.q.device), cache.values.to(row.q.device))
        kv_heads, head_dim = row.k.shape[1:]
        groups = row.q.view(kv_heads, -1, head_dim)
        with self.model.part("score"):
            scores = pages.scores(groups)
        if self.options.per == "kv_head":
            scores = scores.amax(1, keepdim=True)
        with self.model.part("select"):
            chosen = _best_pages(scores, self.count)
        return _attend_pages(groups, cache.keys, cache.values, chosen, self.options.page)

    def replay(self) -> Replay | None:
        """Where every step reads the same number of pages.

        Not so while a cache fits a budget that is not whole pages, and outgrows it later: then all pages are read at
        first, and one fewer from some token on.
        """
        if self._fits:
            return self.dense_replay
        whole = self.budget <= self.count * self.options.page
        steady = whole or self.cache[0].length >= self.budget
        if not steady or self._replay.room > MOST_PAGES:
            return None
        self._replay.prepare(self.pages, self.count)
        return self._replay

    def kv_bytes(self) -> int:
        """Bytes of the caches that are on the device when the prefill is over."""
        return sum(cache.nbytes for layer, cache in enumerate(self.cache) if layer not in self._stores)

    def kv_bytes_host(self) -> int:
        """Bytes of the others, with `offload=host`."""
        return sum(store.nbytes for store in self._stores.values())

    def decode_bytes(self) -> int:
        """Chosen pages and all bounds; everything in dense layers or while it fits the budget.

        Wherever they lie: with `offload=host` the chosen pages come over the bus, which is slower than device memory.
        """
        return sum(self._read_bytes(layer) for layer in range(len(self.cache)))

    def _read_bytes(self, layer: int) -> int:
        cache = self.cache[layer]
        if layer < self.options.dense_layers or cache.length <= self.budget:
            return cache.resident_nbytes
        choosers = self.model.shape.heads // self.model.shape.kv_heads if self.options.per == "query_head" else 1
        chosen = min(cache.length, self.budget * choosers)
        return cache.resident_nbytes * chosen // cache.length + self.pages[layer].read_bytes(cache.length)

    def extra_bytes(self) -> int:
        """Bytes of the pages' bounds, and of what replayed steps choose in, room for longer requests included.

        The bounds are an eighth of the keys' bytes at 16 tokens a page.
        """
        spare = sum(store.spare_nbytes for store in self._stores.values())
        return sum(pages.nbytes for pages in self.pages) + self._replay.nbytes + spare


def _best_pages(scores: Tensor, count: int) -> Tensor:
    """The last page and the best others: [kv_heads, choosers, pages] -> [kv_heads, choosers, count] ascending."""
    scores = scores.clone()
    scores[..., -1] = torch.inf
    return scores.topk(count).indices.sort().values


def _attend_pages(groups: Tensor, keys: Tensor, values: Tensor, pages: Tensor, size: int) -> Tensor:
    """Exact attention of one token over chosen pages, reading nothing else.

    Args:
        groups: queries, [kv_heads, group, d].
        keys, values: [n, kv_heads, d], on the host perhaps.
        pages: [kv_heads, choosers, m], choosers being 1 (the group shares its pages) or group.
        size: tokens a page.

    Returns:
        [1, heads * d].
    """
    kv_heads, group, d = groups.shape
    choosers = pages.shape[1]
    tokens = (pages.unsqueeze(-1) * size + torch.arange(size, device=pages.device)).flatten(2)
    beyond = (tokens >= keys.shape[0]).unsqueeze(2)
    read_keys, read_values = (_gather(store, tokens.clamp(max=keys.shape[0] - 1)) for store in (keys, values))
    queries = groups.reshape(kv_heads, choosers, group // choosers, d)
    logits = (queries @ read_keys.transpose(-1, -2)).float() / math.sqrt(d)
    weights = logits.masked_fill(beyond, -torch.inf).softmax(-1).to(values.dtype)
    return (weights @ read_values).reshape(1, -1)


def _gather(store: Tensor, tokens: Tensor) -> Tensor:
    """Rows of each KV head, gathered where they lie and brought to where the numbers of the tokens are.

    Args:
        store: [n, kv_heads, d].
        tokens: [kv_heads, choosers, m].

    Returns:
        [kv_heads, choosers, m, d].
    """
    head = torch.arange(store.shape[1], device=store.device).view(-1, 1, 1)
    return store[tokens.to(store.device), head].to(tokens.device)
