"""Methods that rate a token by all the attention that it got: in the prefill, or as long as it is there."""

from __future__ import annotations

from torch import Tensor

from harness.engine.cache import gather
from harness.engine.method import ModelContext
from harness.engine.replay.eviction import LowestOut
from harness.engine.replay.replay import Replay
from harness.engine.step import Heads, Step
from harness.options import OptionSet
from methods.common.evicting import Evicting
from methods.common.scores import attention_sums


class Summing(Evicting):
    """Where it evicts in decode, every query adds to the sums, and sums go with their tokens."""

    takes_sparse = False  # the sums are those of dense attention

    def __init__(self, options: OptionSet, model: ModelContext) -> None:
        """As `Method`."""
        super().__init__(options, model)
        self._replay = LowestOut()

    def recent(self, layer: int) -> int:
        """How many of a layer's last tokens stay whatever they got."""
        raise NotImplementedError

    def begin(self, prompt_len: int, max_new_tokens: int) -> None:
        """Nothing was looked at yet."""
        super().begin(prompt_len, max_new_tokens)
        self._sums: dict[int, Tensor] = {}
        self._norms: Tensor | None = None

    def held_queries(self) -> int | None:
        """Layers choose one by one: sums take what attention has divided a layer's rows by."""
        return None

    def sums(self, layer: int, heads: Heads) -> Tensor:
        """What each token of a layer got so far, [kv_heads, n] float32; `heads` as in `score`."""
        return self._sums[layer] if self.evicts_in_decode() else attention_sums(heads.q, heads.k, self._norms)

    def survivors(self, layer: int, heads: Heads) -> Tensor | None:
        """As in the base; first the new queries count."""
        if not self.evicts_in_decode():
            return super().survivors(layer, heads)
        with self.model.part("score"):
            self._sums[layer] = self._added(layer, heads)
        index = super().survivors(layer, heads)
        if index is not None:
            self._sums[layer] = gather(self._sums[layer].T, index).T
        return index

    def _added(self, layer: int, heads: Heads) -> Tensor:
        new = attention_sums(heads.q, heads.k, self._norms)
        if layer in self._sums:
            new[:, : self._sums[layer].shape[1]] += self._sums[layer]
        return new

    def _prefill(self, layer: int, heads: Heads, step: Step) -> Tensor:
        if not self.evicts_in_decode() and self.budget(layer) >= len(heads):
            return super()._prefill(layer, heads, step)
        # Attention comes first, because it leaves what its rows were divided by.
        one = (x.unsqueeze(0) for x in (heads.q, heads.k, heads.v))
        attended, norms = self.model.attention.normalised(*one)
        self._norms = norms[0]
        self._store(layer, heads, self.survivors(layer, heads))
        self._norms = None
        return attended.reshape(len(heads), -1)

    def replay(self) -> Replay | None:
        """Every step of one that evicts in decode, each KV head's token of the lowest sum goes."""
        if not self.evicts_in_decode():
            return super().replay()
        shape = self.model.shape
        limits, recents = ([count(layer) for layer in range(shape.layers)] for count in (self.budget, self.recent))
        self._replay.prepare(self.cache, shape.heads, limits, recents, self._sums)
        return self._replay

    def extra_bytes(self) -> int:
        """Bytes of the sums, and of what recorded steps rate tokens by."""
        return sum(sums.nbytes for sums in self._sums.values()) + self._replay.nbytes
