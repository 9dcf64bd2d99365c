"""Methods that keep few keys and values of a dense prefill: score, choose, gather, for each layer and KV head.

How many (`budget`), which are worth most (`score`) and which of those stay (`choose`) are three questions, so a method
answers the one that its paper is about. What is dropped is never stored: a layer's cache is made of what stays.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from harness.engine.cache import gather
from harness.engine.method import Method
from harness.engine.replay.replay import Replay
from harness.engine.step import Heads, Step

Index = Tensor | Sequence[Tensor]
"""Tokens that stay: [m, kv_heads] int64, or for each KV head its own [m] where the heads keep different numbers."""


class Evicting(Method):
    """Dense attention in the prefill; each KV head then keeps the prompt tokens that it rates highest."""

    def budget(self, layer: int) -> int:
        """Prompt tokens that each KV head of a layer keeps, 1 to all."""
        return self.prompt_len

    def score(self, layer: int, heads: Heads) -> Tensor:
        """How much each token is worth, [kv_heads, n] float32; infinity for tokens that must stay.

        Args:
            layer: the layer.
            heads: of all n tokens of the prompt.
        """
        raise NotImplementedError

    def choose(self, scores: Tensor, count: int) -> Index:
        """Which tokens stay, ascending for each head; of equal ones the first.

        Args:
            scores: [kv_heads, n] float32.
            count: of each head, below n; where heads differ, their mean.

        Returns:
            [count, kv_heads] int64, or what `RaggedHeads` takes.
        """
        return best_first(scores)[:, :count].sort(1).values.T

    def attend(self, layer: int, heads: Heads, step: Step) -> Tensor:
        """Stores what stays of the prompt, and attends to everything."""
        if step.phase == "decode" or self.budget(layer) >= len(heads):
            return super().attend(layer, heads, step)
        out = self.model.attention.causal(heads.q, heads.k, heads.v)
        with self.model.part("score"):
            scores = self.score(layer, heads)
        with self.model.part("select"):
            index = self.choose(scores, self.budget(layer))
        with self.model.part("gather"):
            self.keep(layer, heads, index)
        return out

    def keep(self, layer: int, heads: Heads, index: Index) -> None:
        """Stores the tokens that were chosen."""
        assert isinstance(index, Tensor), "heads that keep different numbers of tokens need `RaggedHeads`"
        self.cache[layer].append(gather(heads.k, index), gather(heads.v, index), heads.positions[index])

    def replay(self) -> Replay | None:
        """Every new token attends to all that is left."""
        return self.dense_replay

    def tokens_requested(self) -> list[int]:
        """The budgets."""
        return [min(self.budget(layer), self.prompt_len) for layer in range(self.model.shape.layers)]


def best_first(scores: Tensor) -> Tensor:
    """Indices along the last dimension from the greatest score down; of equal ones the first comes first."""
    return torch.sort(scores, stable=True, dim=-1, descending=True).indices
