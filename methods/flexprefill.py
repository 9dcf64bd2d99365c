"""FlexPrefill (Lai et al., arXiv 2502.20766): each query head decides from its own prompt how, and how much, it skips.

The prompt's last 128 queries look at all keys. If attention between mean queries and mean keys of blocks of 128 tells
the same of them (square root of the Jensen-Shannon divergence below `tau`), it is trusted for all rows, and the head is
query-aware: of the map of all blocks, the heaviest are attended to that together have the share `gamma`. Any other head
follows columns and diagonals, by blocks: as many as hold `gamma` of what its last queries look at, `min_budget` at
least. Query-aware heads have `min_budget` of these, too. The first block and the diagonal always are among them.

Interpretations, as in the authors' code:
- one threshold for the whole map of a query-aware head, and not one for each row;
- a prompt of up to 256 tokens, or up to `min_budget`, is dense;
- of equal scores the first block is chosen.
"""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from harness.engine.sparse import Choice
from harness.engine.step import Heads
from harness.options import Budget, OptionSet, budget_tokens
from methods.common.block_map import BLOCK, block_means, block_sums, heaviest
from methods.common.scores import head_dots, last_attention
from methods.common.sparse_prefill import SparsePrefill
from methods.common.vertical_slash import offset_sums

Share = Annotated[float, Field(ge=0, le=1)]


class FlexPrefill(SparsePrefill):
    """Attends to what the prompt's last rows, or means of blocks, say."""

    name = "flexprefill"
    summary = "FlexPrefill: each head's prefill attends to similar blocks, or to columns and diagonals, as it needs"
    parallel = True
    nothing = MappingProxyType({"min_budget": "1"})

    class Options(OptionSet):
        """How much, and whom to trust."""

        gamma: Share = Field(0.9, description="share of attention that the chosen keys have; paper: 0.9 or 0.95")
        tau: Share = Field(0.1, description="divergence below which means of blocks are trusted; 0: never")
        min_budget: Budget = Field(512, description="tokens' worth of columns and of diagonals at least")

    options: Options

    def choose(self, layer: int, heads: Heads) -> Choice | None:
        """Blocks of 128 by 128; None for a short prompt."""
        n = len(heads)
        least = math.ceil(budget_tokens(self.options.min_budget, n) / BLOCK)
        if n <= max(2, least) * BLOCK:
            return None
        attention = last_attention(heads.q[-BLOCK:], heads.k)
        # Diagonals count from the farthest, as the authors' blocks of them do.
        vertical, slash = attention.mean(1), offset_sums(attention).flip(1) / BLOCK
        queries, keys = block_means(heads.q), block_means(heads.k)
        last = heads.q[-BLOCK:].float().mean(0, keepdim=True)
        aware = _divergence(_softmax(last, keys)[:, 0], block_sums(vertical)) < self.options.tau
        columns, diagonals = (
            heaviest(_first_stays(block_sums(lines), at), self._blocks(lines, least).where(~aware, least))
            for lines, at in ((vertical, 0), (slash, -1))
        )
        place = torch.arange(len(keys), device=aware.device)
        diagonal = (place - place.unsqueeze(1)).clamp(max=0) + len(keys) - 1
        similar = self._similar(_softmax(queries, keys, causal=True)) & aware.view(-1, 1, 1)
        return Choice.on_grid((columns.unsqueeze(1) | diagonals[:, diagonal] | similar).tril(), BLOCK)

    def _blocks(self, lines: Tensor, least: int) -> Tensor:
        """Blocks for as many columns or diagonals, [heads, n], as have the share, and one more: [heads]."""
        heavier = lines.sort(1, descending=True).values.cumsum(1) <= self.options.gamma
        return ((heavier.sum(1) + 1) // BLOCK + 1).clamp(min=least)

    def _similar(self, attention: Tensor) -> Tensor:
        """The heaviest pairs of blocks of a head that have its share of all rows, [heads, blocks, blocks]."""
        values, order = torch.sort(attention.flatten(1), stable=True, dim=1, descending=True)
        stays = values.cumsum(1) <= self.options.gamma * attention.shape[1]
        return torch.zeros_like(stays).scatter(1, order, stays).view_as(attention)


def _softmax(queries: Tensor, keys: Tensor, *, causal: bool = False) -> Tensor:
    """Attention between means, [rows, heads, d] and [blocks, kv_heads, d] -> [heads, rows, blocks]."""
    logits = head_dots(queries, keys) / math.sqrt(queries.shape[2])
    if causal:
        logits = logits.masked_fill(torch.ones_like(logits[0], dtype=torch.bool).triu(1), -torch.inf)
    return logits.softmax(2)


def _first_stays(scores: Tensor, at: int) -> Tensor:
    scores[:, at] = torch.inf
    return scores


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence in nats, [heads]; not a number, below nothing, where one has 0."""
    mean = (p + q) / 2
    halves = [(x * (x / mean).log()).sum(1) for x in (p, q)]
    return ((halves[0] + halves[1]) / 2).sqrt()
