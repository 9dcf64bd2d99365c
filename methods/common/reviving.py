"""Decode that brings dropped tokens back: the second half of LazyLLM.

What a token had become when the prefill dropped it, its hidden state, is kept in the *Aux Cache* of that pruning point,
since layers behind it have no keys and values for it. Every decode step starts again from all tokens and selects anew
at every pruning point. A selected token whose keys and values are missing from here on is *revived*: its hidden state
leaves the Aux Cache and runs beside the new token, up to where it is dropped again. So every token is computed at most
once a layer, and for every layer boundary it has either keys and values behind it or exactly one Aux entry at or before
it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.engine.method import Method, ModelContext
from harness.engine.replay.replay import Replay
from harness.engine.step import Heads, Rows, Step
from harness.options import OptionSet
from methods.common.aux_cache import AuxCache, true_at
from methods.replay.lazyllm import Revival


class Reviving(Method):
    """Attends in decode to the tokens selected for each layer, and computes those that lack keys and values there.

    Attributes:
        layers: the pruning points, as the first layer behind each.
        aux: Aux Caches, by that layer.
    """

    reorders = True  # revived tokens come in behind the newer ones

    def __init__(self, options: OptionSet, model: ModelContext) -> None:
        super().__init__(options, model)
        self.layers = self.pruning_points()
        self.aux: dict[int, AuxCache] = {}
        self._revival = Revival(self.layers, model.shape.layers, self.aux, model.ranks)

    def pruning_points(self) -> tuple[int, ...]:
        """The first layer behind each, ascending, by the options."""
        raise NotImplementedError

    def choose(self, layer: int, q: Tensor, keys: Tensor, seen: int) -> Tensor | None:
        """Which tokens go on behind a layer.

        Args:
            layer: the layer that scores, ahead of a pruning point.
            q: of the newest token, [1, heads, d].
            keys: [n, kv_heads, d], the newest token last.
            seen: tokens seen so far.

        Returns:
            Indices of keys, ascending, that of the newest among them; None if all may stay.
        """
        raise NotImplementedError

    def counts(self, seen: int) -> list[int]:
        """How many each pruning point chooses, with `seen` tokens so far in the text."""
        raise NotImplementedError

    def revives(self) -> bool:
        """Whether dropped tokens come back; else decode attends to all that the prefill kept."""
        return True

    def begin(self, prompt_len: int, max_new_tokens: int) -> None:
        """Empties the Aux Caches."""
        super().begin(prompt_len, max_new_tokens)
        self._empty_aux()
        self._total = prompt_len + max_new_tokens
        self._index: Tensor | None = None
        self._recomputed = 0
        self._revival.forget()

    def end(self) -> None:
        """Frees the Aux Caches too."""
        super().end()
        self._empty_aux()

    def _empty_aux(self) -> None:
        # In the same mapping, which recorded steps know too.
        self.aux.update((layer, AuxCache()) for layer in self.layers)

    def put_aside(self, layer: int, rows: Rows, chosen: Tensor) -> None:
        """Keeps, in the prefill, the rows of all tokens but the chosen ones, [m] int64, for decode to revive."""
        dropped = torch.ones(len(rows), dtype=torch.bool, device=chosen.device).index_fill_(0, chosen, False)
        self.aux[layer].put(rows.select(true_at(dropped, len(rows) - len(chosen))))

    def attend(self, layer: int, heads: Heads, step: Step) -> Tensor:
        """In decode, attends to the selected tokens alone, by their original positions."""
        if step.phase == "prefill" or not self.revives():
            return super().attend(layer, heads, step)
        if layer == 0:
            self._index = None
            self._revival.settle()
        cache = self.cache[layer]
        cache.append(heads.k, heads.v, heads.positions)
        self._recomputed += len(heads) - step.count
        keys, values, mask = self._visible(cache.keys), self._visible(cache.values), None
        if len(heads) > 1:
            mask = self._visible(cache.token_positions) <= heads.positions.unsqueeze(1)
        return self.model.attention.masked(heads.q, keys, values, mask)

    def after_layer(self, layer: int, rows: Rows, heads: Heads, step: Step) -> Rows:
        """At a pruning point of decode: selects, puts dropped rows aside and fetches missing ones."""
        if step.phase == "prefill" or layer + 1 not in self.aux or not self.revives():
            return rows
        cache = self.cache[layer]
        chosen = self.choose(layer, heads.q[-1:], self._visible(cache.keys), step.start + step.count)
        if chosen is None and self._index is None and self.cache[layer + 1].length + len(rows) == cache.length:
            return rows  # all stay, and none is missing there
        selected, count = self._select(layer, chosen, step)
        rows = self._exchange(self.aux[layer + 1], rows, selected, step)
        present = torch.cat((self.cache[layer + 1].token_positions, rows.positions))
        self._index = None if count == len(present) else true_at(selected[present], count)
        return rows

    def _select(self, layer: int, chosen: Tensor | None, step: Step) -> tuple[Tensor, int]:
        """Which of the tokens visible in `layer` are visible behind it, [tokens] bool, and how many those are."""
        positions, seen = self._visible(self.cache[layer].token_positions), step.start + step.count
        if chosen is not None:
            positions = positions[chosen]
        selected = torch.zeros(self._total, dtype=torch.bool, device=positions.device).index_fill_(0, positions, True)
        selected[step.start : seen] = True
        # A lone new token is always among the chosen, so the device need not be asked how many there are.
        return selected, len(positions) if step.count == 1 else int(selected.sum())

    def _exchange(self, aux: AuxCache, rows: Rows, selected: Tensor, step: Step) -> Rows:
        """Rows come to a pruning point; those selected go on, with those selected that were on hold."""
        if len(rows) == step.count:  # new tokens alone, which always go on
            return rows.merged(aux.take(selected))
        aux.put(rows)
        taken = aux.take(selected)
        assert taken is not None
        return taken

    def _visible(self, cached: Tensor) -> Tensor:
        """Those of a layer's cached keys, values or positions whose tokens are selected, the newest last.

        Between two pruning points all caches hold the same tokens in the same order, so one index serves them all.
        """
        return cached if self._index is None else cached.index_select(0, self._index)

    def replay(self) -> Replay:
        """The same work for every token; with revival, up to the number of rows behind a pruning point."""
        if not self.revives():
            return self.dense_replay
        start = self.cache[0].length
        wanted = [self.counts(seen) for seen in range(start + 1, self._total + 1)]
        self._revival.prepare(self.cache, self._total, wanted)
        return self._revival

    def extra_bytes(self) -> int:
        """Bytes of the Aux Caches: a hidden state, as much as hidden / (2 kv_heads head_dim) layers of KV, a token.

        And of what replayed steps keep of all tokens: some 80 bytes each.
        """
        return sum(aux.nbytes for aux in self.aux.values()) + self._revival.nbytes

    def tokens_recomputed(self) -> int:
        """Prompt tokens times layers that decode computed."""
        return self._recomputed + self._revival.recomputed
