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
  read pages move to pinned host memory (`methods.common.offloading`), and only the bounds of their pages stay on the
  device. What is attended to is the same.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from harness.engine.method import ModelContext
from harness.engine.replay.pages import MOST_PAGES
from harness.engine.replay.replay import Replay
from harness.engine.step import Heads, Step
from harness.options import Budget, OptionSet, budget_tokens, window_tokens
from methods.common.offloading import Offloading
from methods.common.paging import PageBounds, attend_pages, best_pages
from methods.replay.quest import QuestReplay


class Quest(Offloading):
    """Keeps all keys and values, reads few."""

    name = "quest"
    summary = "Quest: decode attends to the best pages of the KV cache only"
    counted = "attended"
    parallel = True
    takes_sparse = True
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

    def host_layers(self) -> range:
        """With `offload=host` those that read pages."""
        return range(self.options.dense_layers, self.model.shape.layers if self.options.offload == "host" else 0)

    def question_tokens(self, prompt_len: int, question: int) -> int:
        """The question, with `question=decode`."""
        if self.options.question == "prefill":
            return 0
        return min(question or self.options.question_tokens, prompt_len - 1)

    def begin(self, prompt_len: int, max_new_tokens: int) -> None:
        """Forgets the pages and turns the budget into tokens, and pages, of this prompt."""
        super().begin(prompt_len, max_new_tokens)
        self.total, page = prompt_len + max_new_tokens, self.options.page
        self.budget = window_tokens(self.options.budget, prompt_len, self.total)
        self.count = max(1, self.budget // page)
        self.all_read = max(self.budget, self.count * page)  # tokens up to which nothing is skipped
        self.pages = [PageBounds(page, -(-self.total // page)) for _ in self.cache]
        self._replay.make_room(self.total)

    def asked_share(self, prompt_len: int) -> float:
        """Everything in the dense layers, the budget in the others."""
        depth, read = self.model.shape.layers, budget_tokens(self.options.budget, prompt_len) / prompt_len
        dense = min(self.options.dense_layers, depth)
        return (dense + (depth - dense) * read) / depth

    def end(self) -> None:
        """Frees the bounds too."""
        super().end()
        self.pages = []

    def attend(self, layer: int, heads: Heads, step: Step) -> Tensor:
        """Dense in the prefill and in the first layers; pages elsewhere, chosen anew for every token."""
        if layer < self.options.dense_layers:
            return super().attend(layer, heads, step)
        if step.phase == "decode":
            return torch.cat([self._decode(layer, row) for row in heads.single()])
        out = super().attend(layer, heads, step)
        self._bound(layer)
        return out

    def _bound(self, layer: int) -> None:
        """Brings the pages' bounds up to the cache, in requests long enough for pages to be left out."""
        if self.total > self.all_read:
            self.pages[layer].update(self.cache[layer].keys)

    def _decode(self, layer: int, row: Heads) -> Tensor:
        cache, pages = self.cache[layer], self.pages[layer]
        cache.append(row.k, row.v, row.positions)
        self._bound(layer)
        if cache.length <= self.all_read:
            return self.model.attention.causal(row.q, cache.keys.to(row.q.device), cache.values.to(row.q.device))
        groups = row.q.view(row.k.shape[1], -1, row.q.shape[2])
        with self.model.part("score"):
            scores = pages.scores(groups)
        if self.options.per == "kv_head":
            scores = scores.amax(1, keepdim=True)
        with self.model.part("select"):
            chosen = best_pages(scores, self.count)
        return attend_pages(groups, cache.keys, cache.values, chosen, self.options.page)

    def replay(self) -> Replay | None:
        """Where every step reads the same number of pages.

        Not so while a cache fits a budget that is not whole pages, and outgrows it later: then all pages are read at
        first, and one fewer from some token on.
        """
        if self.total <= self.all_read:
            return self.dense_replay
        steady = self.all_read == self.count * self.options.page or self.cache[0].length >= self.all_read
        if not steady or self._replay.room > MOST_PAGES:
            return None
        self._replay.prepare(self.pages, self.count)
        return self._replay

    def decode_bytes(self) -> int:
        """Chosen pages and all bounds; everything in dense layers or while it fits the budget.

        Wherever they lie: with `offload=host` the chosen pages come over the host link, see `bus_bytes`.
        """
        return sum(self._read_bytes(layer) for layer in range(len(self.cache)))

    def _read_bytes(self, layer: int) -> int:
        if self._reads_all(layer):
            return self.cache[layer].resident_nbytes
        return self._chosen_bytes(layer) + self.pages[layer].read_bytes(self.cache[layer].length)

    def _reads_all(self, layer: int) -> bool:
        return layer < self.options.dense_layers or self.cache[layer].length <= self.budget

    def _chosen_bytes(self, layer: int) -> int:
        cache = self.cache[layer]
        if self._reads_all(layer):
            return cache.resident_nbytes
        choosers = self.model.shape.heads // self.model.shape.kv_heads if self.options.per == "query_head" else 1
        return cache.resident_nbytes * min(cache.length, self.budget * choosers) // cache.length

    def bus_bytes(self) -> int:
        """What a step reads in layers whose keys and values lie on the host, times the steps so far."""
        each = (self._chosen_bytes(layer) * (self.cache[layer].length - self.prompt_len) for layer in self.stores)
        return sum(each)

    def extra_bytes(self) -> int:
        """Bytes of the pages' bounds, 1/8 of the keys' at 16 tokens a page, and of what replayed steps choose in."""
        return sum(pages.nbytes for pages in self.pages) + self._replay.nbytes + super().extra_bytes()
