"""What a method adds to `Evicting` whose KV heads keep different numbers of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import Tensor

from harness.engine.method import ModelContext
from harness.engine.ragged import RaggedCache
from harness.engine.replay.ragged import RaggedReplay
from harness.engine.replay.replay import Replay
from harness.engine.step import Heads, Step
from harness.engine.streams import sent
from harness.options import OptionSet
from methods.common.evicting import Evicting
from methods.common.take import take_each


class RaggedHeads(Evicting):
    """Each KV head has memory for the tokens that it keeps, and no more."""

    def __init__(self, options: OptionSet, model: ModelContext) -> None:
        """As `Method`."""
        super().__init__(options, model)
        self._replay = RaggedReplay()

    def begin(self, prompt_len: int, max_new_tokens: int) -> None:
        """Forgets the last request and makes room for the next."""
        super().begin(prompt_len, max_new_tokens)
        # Heads that keep everything keep the same, and need no memory each of its own.
        if any(self.budget(layer) < prompt_len for layer in range(len(self.cache))):
            self.cache = [RaggedCache(cache.spare, cache.most) for cache in self.cache]

    def choose_each(self, scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The tokens of each KV head that stay, and how many those are, at least one.

        Args:
            scores: [layers, kv_heads, n] float32.
            count: tokens that a layer's heads keep in the mean, below n.

        Returns:
            [layers, kv_heads, m] int64, ascending as far as they count, and how many do, [layers, kv_heads] int64.
        """
        raise NotImplementedError

    def _prefill(self, layer: int, heads: Heads, step: Step) -> Tensor:
        if self.budget(layer) >= len(heads):
            return super()._prefill(layer, heads, step)
        store = self._choosing(range(layer, layer + 1), heads)
        # The host has to know the numbers to make room; until it does the device attends. Were they chosen beside
        # attention, they would come late, and the device would wait for the host.
        attended = self.causal(layer, heads)
        store()
        return attended

    def settle(self, layers: range, heads: Heads) -> None:
        """Stores what stays of several layers; waits for the numbers once."""
        if all(self.budget(layer) >= len(heads) for layer in layers):
            self._store_all(layers, heads)
        else:
            self._choosing(layers, heads)()

    def _choosing(self, layers: range, heads: Heads) -> Callable[[], None]:
        """Chooses for layers; returns what waits for the numbers, and stores."""
        with self.model.part("score"):
            scores = self.score(layers, heads)
        with self.model.part("select"):
            tokens, counts = self.choose_each(scores.reshape(len(layers), -1, scores.shape[1]), self.budget(layers[0]))
        arrived, into = sent(counts.flatten()), [cast("RaggedCache", self.cache[layer]) for layer in layers]
        caches = [own for cache in into for own in cache.apart(counts.shape[1])]

        def store() -> None:
            with self.model.part("gather"):
                take_each(caches, heads, tokens.flatten(0, 1), arrived().tolist())
                for cache in into:
                    cache.measure()

        return store

    def replay(self) -> Replay | None:
        """Every new token attends to all that each head has left."""
        return self._replay if isinstance(self.cache[0], RaggedCache) else self.dense_replay
