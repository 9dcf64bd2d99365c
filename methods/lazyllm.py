"""LazyLLM (Fu et al., arXiv 2407.14057): progressive pruning of single prompt tokens, with a way back in decode.

Scores (eq. 1): after a pruning point's layer, a token is worth the last token's attention to it, averaged over heads.

Prefill: the lowest-rated tokens go no further. What a dropped token had become by then, its hidden state, is kept in
the *Aux Cache* of that pruning point, since layers behind it have no keys and values for it.

Decode: every step starts again from all tokens and selects anew at every pruning point. A selected token whose keys and
values are missing from here on is *revived*: its hidden state leaves the Aux Cache and runs beside the new token, up to
where it is dropped again. So every token is computed at most once a layer, and for every layer boundary it has either
keys and values behind it or exactly one Aux entry at or before it.

Interpretations, where the paper leaves a choice:
- a pruning layer is the first one to hold the pruned set (0-based); the score is taken in the layer before;
- `of`: shares are of all tokens seen so far (default), or of the tokens that reached the pruning point;
- the newest token always stays; nothing else is protected, generated tokens compete like prompt tokens in decode;
- layers and counts default to SlimInfer's, so that the two differ in what they choose and in nothing else; the paper
  publishes no counts, and its drawn schedule is `keep=0.7/0.49/0.343:layers=9/19/28` for 32 layers;
- `revive=false`: dropped tokens are gone, decode attends to all that the prefill kept.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from harness.engine.method import Method, ModelContext
from harness.engine.replay.replay import Replay
from harness.engine.shape import ModelShape
from harness.engine.step import Heads, Rows, Step
from harness.options import Budget, OptionSet, budget_tokens
from methods.common.aux_cache import AuxCache, true_at
from methods.common.schedule import check_schedule, pruning_layers, requested_tokens
from methods.common.scores import token_attention
from methods.replay.lazyllm import Revival


class LazyLLM(Method):
    """Prunes hidden states token by token, and revives them when decode asks for them."""

    name = "lazyllm"
    summary = "LazyLLM: progressive pruning of prompt tokens, revival from an Aux Cache in decode"
    reorders = True  # revived tokens come in behind the newer ones
    takes_sparse = True
    nothing = MappingProxyType({"keep": "1/1/1"})

    class Options(OptionSet):
        """The paper's three knobs (how many pruning points, where, how much each keeps) and two readings."""

        keep: tuple[Budget, ...] = Field(
            (0.75, 0.375, 0.25), description="tokens kept from each pruning layer on; paper's figure: 0.7/0.49/0.343"
        )
        layers: tuple[int, ...] | None = Field(
            None, description="first layer to hold each pruned set; default 10/20/30 of 32, paper: 9/19/28 of 32"
        )
        of: Literal["prompt", "survivors"] = Field("prompt", description="what a share of `keep` is a share of")
        revive: bool = Field(True, description="let decode bring dropped tokens back")

    options: Options

    def __init__(self, options: OptionSet, model: ModelContext) -> None:
        super().__init__(options, model)
        self.layers = pruning_layers(self.options.layers, model.shape.layers)
        self.aux: dict[int, AuxCache] = {}
        self._revival = Revival(self.layers, model.shape.layers, self.aux)

    @classmethod
    def check(cls, options: OptionSet, shape: ModelShape) -> None:
        """Raises `InputError` for layers the model lacks, and for a model too shallow for the default schedule."""
        assert isinstance(options, cls.Options)
        check_schedule(cls.name, options.layers, options.keep, shape)

    def begin(self, prompt_len: int, max_new_tokens: int) -> None:
        """Empties the Aux Caches."""
        super().begin(prompt_len, max_new_tokens)
        self._empty_aux()
        self._total = prompt_len + max_new_tokens
        self._index: Tensor | None = None
        self._recomputed = self._revival.recomputed = 0

    def end(self) -> None:
        """Frees the Aux Caches too."""
        super().end()
        self._empty_aux()

    def _empty_aux(self) -> None:
        # In the same mapping, which recorded steps know too.
        self.aux.update((layer, AuxCache()) for layer in self.layers)

    def attend(self, layer: int, heads: Heads, step: Step) -> Tensor:
        """In decode, attends to the selected tokens alone, by their original positions."""
        if step.phase == "prefill" or not self.options.revive:
            return super().attend(layer, heads, step)
        if layer == 0:
            self._index = None
        cache = self.cache[layer]
        cache.append(heads.k, heads.v, heads.positions)
        self._recomputed += len(heads) - step.count
        keys, values, mask = self._visible(cache.keys), self._visible(cache.values), None
        if len(heads) > 1:
            mask = self._visible(cache.token_positions) <= heads.positions.unsqueeze(1)
        return self.model.attention.masked(heads.q, keys, values, mask)

    def after_layer(self, layer: int, rows: Rows, heads: Heads, step: Step) -> Rows:
        """At a pruning point: selects, puts dropped rows aside and, in decode, fetches missing ones."""
        if layer + 1 not in self.aux:
            return rows
        if step.phase == "prefill":
            return self._prune(layer, rows, heads)
        return self._reselect(layer, rows, heads, step) if self.options.revive else rows

    def replay(self) -> Replay:
        """The same work for every token; with revival, up to the number of rows behind a pruning point."""
        if not self.options.revive:
            return self.dense_replay
        start = self.cache[0].length
        wanted = [self._counts(seen) for seen in range(start + 1, self._total + 1)]
        self._revival.prepare(self.cache, self._total, wanted)
        return self._revival

    def _prune(self, layer: int, rows: Rows, heads: Heads) -> Rows:
        chosen = self._choose(layer, heads.q[-1:], heads.k, self.prompt_len)
        if chosen is None:
            return rows
        if self.options.revive:
            dropped = torch.ones(len(rows), dtype=torch.bool, device=chosen.device).index_fill_(0, chosen, False)
            self.aux[layer + 1].put(rows.select(true_at(dropped, len(rows) - len(chosen))))
        with self.model.part("gather"):
            return rows.select(chosen)

    def _reselect(self, layer: int, rows: Rows, heads: Heads, step: Step) -> Rows:
        """Selects among the tokens visible in `layer`; returns the rows that layer + 1 has to compute."""
        cache, behind, seen = self.cache[layer], self.cache[layer + 1], step.start + step.count
        positions = self._visible(cache.token_positions)
        chosen = self._choose(layer, heads.q[-1:], self._visible(cache.keys), seen)
        if chosen is not None:
            positions = positions[chosen]
        selected = torch.zeros(self._total, dtype=torch.bool, device=positions.device).index_fill_(0, positions, True)
        selected[step.start : seen] = True
        # A lone new token is always among the chosen, so the device need not be asked how many there are.
        count = len(positions) if step.count == 1 else int(selected.sum())
        rows = self._exchange(self.aux[layer + 1], rows, selected, step)
        present = torch.cat((behind.token_positions, rows.positions))
        self._index = None if count == len(present) else true_at(selected[present], count)
        return rows

    def _exchange(self, aux: AuxCache, rows: Rows, selected: Tensor, step: Step) -> Rows:
        """Rows come to a pruning point; those selected go on, with those selected that were on hold."""
        if len(rows) == step.count:  # new tokens alone, which always go on
            return rows.merged(aux.take(selected))
        aux.put(rows)
        taken = aux.take(selected)
        assert taken is not None
        return taken

    def _choose(self, layer: int, q: Tensor, keys: Tensor, seen: int) -> Tensor | None:
        """Indices of the keys that the query attends to most; None if all may stay.

        Args:
            layer: the layer that scores.
            q: [1, heads, d].
            keys: [n, kv_heads, d], the newest token last.
            seen: tokens seen so far.
        """
        count = self._count(self.layers.index(layer + 1), seen, keys.shape[0])
        if count >= keys.shape[0]:
            return None
        with self.model.part("score"):
            scores = token_attention(q, keys)
        with self.model.part("select"):
            scores[-1] = torch.inf
            return scores.topk(count).indices.sort().values

    def _count(self, point: int, seen: int, visible: int) -> int:
        """Tokens that a pruning point keeps, of `visible` ones, with `seen` tokens so far in the text."""
        return min(visible, budget_tokens(self.options.keep[point], seen if self.options.of == "prompt" else visible))

    def _counts(self, seen: int) -> list[int]:
        """The same for all pruning points, one behind the other."""
        counts = [seen]
        for point in range(len(self.layers)):
            counts.append(self._count(point, seen, counts[-1]))
        return counts[1:]

    def _visible(self, cached: Tensor) -> Tensor:
        """Those of a layer's cached keys, values or positions whose tokens are selected, the newest last.

        Between two pruning points all caches hold the same tokens in the same order, so one index serves them all.
        """
        return cached if self._index is None else cached.index_select(0, self._index)

    def tokens_requested(self) -> list[int]:
        """The keep ratios in tokens of the prompt."""
        counts = self._counts(self.prompt_len)
        return requested_tokens(self.layers, counts, self.prompt_len, self.model.shape.layers)

    def extra_bytes(self) -> int:
        """Bytes of the Aux Caches: a hidden state, as much as hidden / (2 kv_heads head_dim) layers of KV, a token.

        And of what replayed steps keep of all tokens: some 80 bytes each.
        """
        return sum(aux.nbytes for aux in self.aux.values()) + self._revival.nbytes

    def tokens_recomputed(self) -> int:
        """Prompt tokens times layers that decode computed."""
        return self._recomputed + self._revival.recomputed
