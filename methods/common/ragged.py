"""What a method adds to `Evicting` whose KV heads keep different numbers of tokens."""

from __future__ import annotations

from torch import Tensor

from harness.engine.cache import HeadTokens
from harness.engine.method import ModelContext
from harness.engine.ragged import RaggedCache
from harness.engine.replay.ragged import RaggedReplay
from harness.engine.replay.replay import Replay
from harness.engine.step import Heads, Step
from harness.options import OptionSet
from methods.common.evicting import Evicting


class RaggedHeads(Evicting):
    """Each KV head has memory for the tokens that it keeps, and no more."""

    def __init__(self, options: OptionSet, model: ModelContext) -> None:
        """As `Method`."""
        super().__init__(options, model)
        self._replay = RaggedReplay()

    def begin(self, prompt_len: int, max_new_tokens: int) -> None:
        """Forgets the last request and makes room for the next."""
        super().begin(prompt_len, max_new_tokens)
        self.cache = [RaggedCache(cache.spare, cache.most) for cache in self.cache]

    def choose_each(self, scores: Tensor, count: int) -> list[Tensor]:
        """For each KV head the tokens that stay, [m] int64 ascending, at least one.

        Args:
            scores: [kv_heads, n] float32.
            count: tokens that a head keeps in the mean, below n.
        """
        raise NotImplementedError

    def _prefill(self, layer: int, heads: Heads, step: Step) -> Tensor:
        if self.budget(layer) >= len(heads):
            return super()._prefill(layer, heads, step)
        with self.model.part("score"):
            scores = self.score(layer, heads)
        with self.model.part("select"):
            each = self.choose_each(scores, self.budget(layer))
        with self.model.part("gather"):
            self._store(layer, heads, each)
        return self.causal(layer, heads)

    def _store(self, layer: int, heads: Heads, each: list[Tensor]) -> None:
        owners = zip(heads.k.unbind(1), heads.v.unbind(1), each, strict=True)
        cache = self.cache[layer]
        assert isinstance(cache, RaggedCache)
        cache.append_heads([HeadTokens(k[own], v[own], heads.positions[own]) for k, v, own in owners])

    def replay(self) -> Replay | None:
        """Every new token attends to all that each head has left."""
        return self._replay
