"""Quest: a decode step reads only the pages of the cache whose keys may match its query best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.reference.model import Twin, best, chunks, tokens_of


@dataclass(frozen=True)
class QuestOptions:
    """The options of `quest`, by the same names."""

    budget: int | float = 0.25
    page: int = 16
    dense_layers: int = 2
    per: str = "query_head"
    offload: str = "none"


class QuestTwin(Twin):
    """The twin of `quest`."""

    def __init__(self, model: Any, prompt_len: int, total: int, options: QuestOptions) -> None:
        super().__init__(model, prompt_len, total)
        share = isinstance(options.budget, float)
        self.options = options
        self.budget = tokens_of(options.budget, prompt_len) if share else int(options.budget)

    def sees(self, layer: int, positions: Tensor, q: Tensor) -> Tensor:
        mask, cached = self.causal(layer, positions), int(positions[-1]) + 1
        if not self.decoding or layer < self.options.dense_layers or cached <= self.budget:
            return mask
        read = torch.zeros(self.decoder.heads, 1, self.total, dtype=torch.bool)
        for head, pages in enumerate(self.pages(layer, q[0], chunks(range(cached), self.options.page))):
            for page in pages:
                read[head, 0, page] = True
        return read

    def pages(self, layer: int, q: Tensor, pages: list[list[int]]) -> list[list[list[int]]]:
        """The pages that each query head reads."""
        group, count = self.decoder.heads // self.decoder.kv_heads, max(1, self.budget // self.options.page)
        scores = [[self.bound(layer, q[head], head // group, page) for page in pages] for head in range(len(q))]
        if self.options.per == "kv_head":
            joint = [[max(column) for column in zip(*heads, strict=True)] for heads in chunks(scores, group)]
            scores = [joint[head // group] for head in range(len(q))]
        return [[pages[page] for page in best(row[:-1], count - 1)] + [pages[-1]] for row in scores]

    def bound(self, layer: int, q: Tensor, kv_head: int, page: list[int]) -> float:
        """The most that q . k can be for a key inside the box around the page's keys."""
        keys = self.keys[layer][page][:, kv_head]
        low, high = keys.min(0).values, keys.max(0).values
        return float(torch.maximum(q * low, q * high).sum())
