"""What a method adds to `Evicting` whose KV heads keep different numbers of tokens."""

from __future__ import annotations

from harness.engine.cache import HeadTokens
from harness.engine.method import ModelContext
from harness.engine.ragged import RaggedCache
from harness.engine.replay.ragged import RaggedReplay
from harness.engine.replay.replay import Replay
from harness.engine.step import Heads
from harness.options import OptionSet
from methods.common.evicting import Evicting, Index


class RaggedHeads(Evicting):
    """Each KV head has memory for the tokens that it keeps, and no more.

    `choose` returns for each KV head the tokens that stay, [m] int64 ascending, at least one.
    """

    def __init__(self, options: OptionSet, model: ModelContext) -> None:
        """As `Method`."""
        super().__init__(options, model)
        self._replay = RaggedReplay()

    def begin(self, prompt_len: int, max_new_tokens: int) -> None:
        """Forgets the last request and makes room for the next."""
        super().begin(prompt_len, max_new_tokens)
        self.cache = [RaggedCache(cache.spare, cache.most) for cache in self.cache]

    def keep(self, layer: int, heads: Heads, index: Index) -> None:
        """Stores what each head keeps."""
        each = zip(heads.k.unbind(1), heads.v.unbind(1), index, strict=True)
        tokens = [HeadTokens(k[own], v[own], heads.positions[own]) for k, v, own in each]
        cache = self.cache[layer]
        assert isinstance(cache, RaggedCache)
        cache.append_heads(tokens)

    def replay(self) -> Replay | None:
        """Every new token attends to all that each head has left."""
        return self._replay
