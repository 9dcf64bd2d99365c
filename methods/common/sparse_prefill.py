"""Methods whose prefill attends to a choice of keys; all keys and values stay, and decode attends to everything."""

from __future__ import annotations

from statistics import mean
from typing import Any

from torch import Tensor

from harness.engine.method import Method, causal_pairs
from harness.engine.replay.replay import Replay
from harness.engine.sparse import Choice
from harness.engine.step import Heads, Step


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
        out, pairs = choice.attend(heads.q, heads.k, heads.v)
        return out, pairs.sum(1)

    def begin(self, prompt_len: int, max_new_tokens: int) -> None:
        """Nothing was attended to yet."""
        super().begin(prompt_len, max_new_tokens)
        self._pairs: dict[int, Tensor] = {}

    def attend(self, layer: int, heads: Heads, step: Step) -> Tensor:
        """Stores everything; decode attends to everything."""
        found = self.prefill(layer, heads) if step.phase == "prefill" else None
        if found is None:
            return super().attend(layer, heads, step)
        self.cache[layer].append(heads.k, heads.v, heads.positions)
        out, self._pairs[layer] = found
        return out

    def replay(self) -> Replay:
        """Every new token attends to everything."""
        return self.dense_replay

    def prefill_pairs(self, rows: int) -> int:
        """What a layer attended to, mean over layers and heads."""
        return round(mean(share for layer in self.density() for share in layer) * super().prefill_pairs(rows))

    def density(self) -> list[list[float]]:
        """Pairs that the prefill attended to, as a share of the causal ones: [layers][heads], 1 where it was dense."""
        return [self._density(layer) for layer in range(self.model.shape.layers)]

    def _density(self, layer: int) -> list[float]:
        if layer not in self._pairs:
            return [1.0] * self.model.shape.heads
        return [pairs / causal_pairs(self.prompt_len) for pairs in self._pairs[layer].tolist()]

    def notes(self) -> dict[str, Any]:
        """The density, as far as four digits tell."""
        return {"density": [[round(share, 4) for share in layer] for layer in self.density()]}
