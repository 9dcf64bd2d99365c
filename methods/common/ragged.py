"""What a method adds to `Evicting` whose KV heads keep different numbers of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.engine.cache import HeadTokens
from harness.engine.method import ModelContext
from harness.engine.ragged import RaggedCache
from harness.engine.replay.ragged import RaggedReplay
from harness.engine.replay.replay import Replay
from harness.engine.step import Heads, Step
from harness.engine.streams import sent
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
        # Heads that keep everything keep the same, and need no memory each of its own.
        if any(self.budget(layer) < prompt_len for layer in range(len(self.cache))):
            self.cache = [RaggedCache(cache.spare, cache.most) for cache in self.cache]

    def choose_each(self, scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The tokens of each KV head that stay, and how many those are, at least one.

        Args:
            scores: [kv_heads, n] float32.
            count: tokens that a head keeps in the mean, below n.

        Returns:
            [kv_heads, m] int64, ascending as far as they count, and how many do, [kv_heads] int64.
        """
        raise NotImplementedError

    def _prefill(self, layer: int, heads: Heads, step: Step) -> Tensor:
        if self.budget(layer) >= len(heads):
            return super()._prefill(layer, heads, step)
        with self.model.part("score"):
            scores = self.score(layer, heads)
        with self.model.part("select"):
            tokens, counts = self.choose_each(scores, self.budget(layer))
        # The host has to know the numbers to make room; until it does the device attends. Were they chosen beside
        # attention, they would come late, and the device would wait for the host.
        arrived = sent(counts)
        attended = self.causal(layer, heads)
        with self.model.part("gather"):
            self._store_each(layer, heads, tokens, counts, arrived().tolist())
        return attended

    def _store_each(self, layer: int, heads: Heads, tokens: Tensor, counts: Tensor, lengths: list[int]) -> None:
        kept = torch.cat([own[:length] for own, length in zip(tokens, lengths, strict=True)])
        owners = torch.arange(len(counts), device=counts.device).repeat_interleave(counts, output_size=len(kept))
        held = (heads.k[kept, owners], heads.v[kept, owners], heads.positions[kept])
        cache = self.cache[layer]
        assert isinstance(cache, RaggedCache)
        each = zip(*(torch.split(x, lengths) for x in held), strict=True)
        cache.append_heads([HeadTokens(*head) for head in each])

    def replay(self) -> Replay | None:
        """Every new token attends to all that each head has left."""
        return self._replay if isinstance(self.cache[0], RaggedCache) else self.dense_replay
