"""Methods whose prefill attends to a choice of keys; all keys and values stay, and decode attends to everything."""

from __future__ import annotations

from statistics import mean
from typing import Any

import torch
from torch import Tensor

from harness.engine.method import Method, causal_pairs
from harness.engine.replay.replay import Replay
from harness.engine.sparse import Choice
from harness.engine.step import Heads


class SparsePrefill(Method):
    """Leaves work out of the prefill's attention: `choose` says where, or `prefill` does it."""

    def choose(self, layer: int, heads: Heads) -> Choice | None:
        """Which keys the rows of a layer attend to; None for all of them.

        Args:
            layer: the layer.
            heads: of all rows of the prefill.
        """
        raise NotImplementedError

    def prefill(self, layer: int, heads: Heads) -> tuple[Tensor, Tensor] | None:
        """Attention of a layer, [n, heads * d], and how many pairs each head took, [heads] int64; None for dense."""
        with self.model.part("select"):
            choice = self.choose(layer, heads)
        if choice is None:
            return None
        out, pairs = choice.attend(self.model.attention, heads.q, heads.k, heads.v)
        return out, pairs.sum(1)

    def begin(self, prompt_len: int, max_new_tokens: int) -> None:
        """Nothing was attended to yet."""
        super().begin(prompt_len, max_new_tokens)
        self._pairs: dict[int, tuple[int, Tensor]] = {}

    def causal(self, layer: int, heads: Heads) -> Tensor:
        """What `prefill` does of it."""
        found = self.prefill(layer, heads)
        if found is None:
            self._pairs[layer] = len(heads), torch.full(heads.q.shape[1:2], causal_pairs(len(heads)))
            return super().causal(layer, heads)
        out, pairs = found
        self._pairs[layer] = len(heads), pairs
        return out

    def replay(self) -> Replay:
        """Every new token attends to everything."""
        return self.dense_replay

    def density(self) -> list[list[float]]:
        """Pairs that the prefill attended to, as a share of its rows' causal ones: [layers][heads]."""
        return [[pairs / causal_pairs(rows) for pairs in each.tolist()] for rows, each in self._pairs.values()]

    def prefill_pairs(self, rows: int) -> int:
        """What a layer of so many rows attended to, mean over such layers and over heads."""
        counts = [each.tolist() for found, each in self._pairs.values() if found == rows]
        return round(mean(pairs for layer in counts for pairs in layer)) if counts else causal_pairs(rows)

    def extra_bytes(self) -> int:
        """Bytes of the counts of pairs."""
        return sum(pairs.nbytes for _, pairs in self._pairs.values())

    def notes(self) -> dict[str, Any]:
        """The density, as far as four digits tell."""
        return {"density": [[round(share, 4) for share in layer] for layer in self.density()]}
