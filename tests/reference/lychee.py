"""LycheeDecode: what each row of each head sees, all of it in retrieval heads, what is handed down in the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.reference.model import Twin, best, tokens_of


def retrieval_heads(gates: Sequence[Sequence[float]], share: float | None) -> list[list[bool]]:
    """All of layer 0, and from the greatest gate down until the share of all heads, rounded up, is reached.

    Without a share, those whose gate is above one half.
    """
    if share is None:
        return [[layer == 0 or gate > 0.5 for gate in row] for layer, row in enumerate(gates)]
    kv_heads = len(gates[0])
    wanted = len(gates) * kv_heads - math.ceil(round((len(gates) * kv_heads - 1) * (1 - share), 6)) if share else 0
    others = [(-gate, layer, head) for layer, row in enumerate(gates) if layer for head, gate in enumerate(row)]
    chosen = sorted(others)[: max(0, wanted - kv_heads)]
    named = {(layer, head) for _, layer, head in chosen}
    return [[layer == 0 or (layer, head) in named for head in range(kv_heads)] for layer in range(len(gates))]


def spaced_layers(depth: int, share: float) -> set[int]:
    """So many of the layers, from the first on, as far apart as they can be."""
    count = max(1, round(share * depth))
    return {index * depth // count for index in range(count)}


class LycheeTwin(Twin):
    """Exact attention under a mask, for each query head its own.

    Attributes:
        handed: for each KV head, the positions that its last retrieval head chose for the row at hand.
    """

    def __init__(
        self, model: Any, prompt_len: int, total: int, budget: int | float, full: list[list[bool]], vote: str = "mean"
    ) -> None:
        super().__init__(model, prompt_len, total)
        share = isinstance(budget, float)
        self.budget = total if share and budget == 1 else tokens_of(budget, prompt_len) if share else int(budget)
        self.full, self.vote = full, vote
        self.handed: list[set[int]] = [set() for _ in full[0]]

    def sees(self, layer: int, positions: Tensor, q: Tensor) -> Tensor:
        """[heads, n, total]."""
        mask = self.causal(layer, positions).repeat(q.shape[1], 1, 1)
        newest = int(positions[-1])
        if not self.decoding or newest + 1 <= max(self.budget, 2):
            return mask
        group = q.shape[1] // len(self.handed)
        for head in range(q.shape[1]):
            if not self.full[layer][head // group]:
                mask[head, 0] = False
                mask[head, 0, [newest, *self.handed[head // group]]] = True
        for kv_head, looks in enumerate(self.full[layer]):
            if looks:
                self.handed[kv_head] = self.choice(layer, kv_head, q[0], newest)
        return mask

    def choice(self, layer: int, kv_head: int, q: Tensor, newest: int) -> set[int]:
        """Of the positions before the newest, those that the query heads of a KV head pay most."""
        group, ratings = len(q) // len(self.handed), []
        for head in range(kv_head * group, (kv_head + 1) * group):
            products = [float(q[head] @ self.keys[layer, place, kv_head]) for place in range(newest + 1)]
            paid = torch.softmax(torch.tensor(products) / math.sqrt(self.decoder.d), dim=0)
            ratings.append(paid[:newest])
        table = torch.stack(ratings)
        rated = table.mean(0) if self.vote == "mean" else table.max(0).values
        return best(rated.tolist(), max(self.budget, 2) - 1)
