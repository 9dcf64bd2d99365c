"""StreamingLLM (Xiao et al., arXiv 2309.17453): attention sinks and a window of recent tokens.

Three variants circulate under the name; `mode` says which one runs:

- `faithful`: every token, of the prompt too, sees the first `sinks` tokens and the last `window` ones, itself
  included, and positions count inside the cache: the oldest recent token directly follows the sinks. The cache never
  holds more.
- `evict`: dense prefill; afterwards sinks and recent tokens stay, at their original positions. TTFT does not change,
  and what stays has absorbed the whole prompt, so it scores higher.
- `ashape`: the prefill attends in the A shape of sinks and window (the work outside is not done), all keys and values
  stay, decode attends to everything.

Rotary attention depends on distances alone. Within the window, distances in the cache equal those in the text, so
window keys keep their original rotation; only the few sink keys are rotated on for each query, to the distance they
have in the cache. This gives the paper's re-indexed positions without rotating the whole cache at every step.

A cache that is full slides through the memory reserved for new tokens: it begins one token later with every step, and
the sinks are written anew in front of the window. So a replayed step moves addresses on the device and nothing else.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from types import MappingProxyType
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from harness.engine.cache import LayerCache
from harness.engine.method import Method, ModelContext
from harness.engine.replay.decode_table import ResidentCaches
from harness.engine.step import Heads, Step
from harness.options import Budget, OptionSet, window_tokens
from methods.common.band import band_attention


class Streaming(Method):
    """Keeps sinks and recent tokens."""

    name = "streaming"
    summary = "StreamingLLM: attention sinks and recent tokens; modes faithful, evict, ashape"
    nothing = MappingProxyType({"window": "1"})

    class Options(OptionSet):
        """How much stays, and which of the three variants."""

        mode: Literal["faithful", "evict", "ashape"] = Field("faithful", description="which variant, see the module")
        sinks: Annotated[int, Field(ge=0)] = Field(4, description="first tokens that all see; paper: 4")
        window: Budget = Field(512, description="recent tokens, the newest included; the authors' code: 512")

    options: Options

    def __init__(self, options: OptionSet, model: ModelContext) -> None:
        super().__init__(options, model)
        # In the same memory for every request, so that a recorded decode step stays valid.
        self._sinks = torch.empty(0)
        self._front: Front | None = None

    def begin(self, prompt_len: int, max_new_tokens: int) -> None:
        """Turns the window into tokens of this prompt."""
        super().begin(prompt_len, max_new_tokens)
        self.window = window_tokens(self.options.window, prompt_len, prompt_len + max_new_tokens)

    def attend(self, layer: int, heads: Heads, step: Step) -> Tensor:
        """Stores what stays, and attends as the mode says."""
        if step.phase == "prefill":
            return self._prefill(layer, heads)
        if self.options.mode == "ashape":
            return super().attend(layer, heads, step)
        if step.resident is not None:
            return self._decode_resident(layer, heads, step.resident)
        return torch.cat([self._decode(layer, row) for row in heads.single()])

    def _prefill(self, layer: int, heads: Heads) -> Tensor:
        attention, sinks = self.model.attention, self.options.sinks
        q, k, v = heads.q, heads.k, heads.v
        if self.options.mode == "ashape":
            self.cache[layer].append(k, v, heads.positions)
            if len(q) <= self.window:
                return attention.causal(q, k, v)
            return band_attention(attention, q, q, k, k[:sinks], v, self.window)
        self._store(layer, heads)
        if self.options.mode == "evict" or len(q) <= sinks + self.window:
            return attention.causal(q, k, v)
        q_sink = self.model.move(q, -self._gap(heads.positions))
        return band_attention(attention, q, q_sink, k, k[:sinks], v, self.window)

    def _store(self, layer: int, heads: Heads) -> None:
        """Puts sinks and window into the cache."""
        sinks, n = self.options.sinks, len(heads.positions)
        index = torch.arange(n, device=heads.positions.device)
        index = index[(index < sinks) | (index >= n - self.window)]
        self.cache[layer].append(heads.k[index], heads.v[index], heads.positions[index])
        if self.options.mode == "faithful":
            self._put_aside(layer, heads.k[:sinks], 0)

    def _put_aside(self, layer: int, keys: Tensor, start: int) -> None:
        """Keeps keys of sinks, from the one at `start` on, as they are at their original positions."""
        if not len(self._sinks):
            self._sinks = keys.new_empty((self.model.shape.layers, self.options.sinks, *keys.shape[1:]))
        self._sinks[layer, start : start + len(keys)] = keys

    def _decode(self, layer: int, heads: Heads) -> Tensor:
        """One token: it comes in, the oldest recent one goes."""
        cache, sinks = self.cache[layer], self.options.sinks
        if self.options.mode == "faithful" and cache.length < sinks:
            self._put_aside(layer, heads.k, cache.length)
        cache.append(heads.k, heads.v, heads.positions)
        self._slide(cache)
        if self.options.mode == "faithful" and sinks:
            keys = self._sinks[layer, : cache.length]
            cache.keys[: len(keys)] = self.model.move(keys, self._gap(heads.positions).expand(len(keys)))
        return self.model.attention.causal(heads.q, cache.keys, cache.values)

    def _slide(self, cache: LayerCache) -> None:
        surplus = cache.length - self.options.sinks - self.window
        if surplus > 0:
            cache.slide(self.options.sinks, surplus)

    def _gap(self, positions: Tensor) -> Tensor:
        """How many positions nearer the sinks are in the cache than in the text, seen from each position: [n]."""
        return positions - positions.clamp(max=self.options.sinks + self.window - 1)

    def static_decode(self) -> bool:
        """As soon as all sinks are there; whether a cache is full, and slides, is decided on the device."""
        if self.options.mode == "ashape":
            return True
        if self.cache[0].length < self.options.sinks:
            return False
        if self._front is None:
            self._front = Front(self.cache, self.options.sinks)
        self._front.take(self.cache)
        return True

    def _decode_resident(self, layer: int, heads: Heads, resident: ResidentCaches) -> Tensor:
        """One token: full caches begin one token later, sinks come in front of the window, the token behind it."""
        assert self._front is not None
        if layer == 0:
            full = (resident.table[:, 2:] >= self.options.sinks + self.window).long()
            resident.table[:, :2] += full * heads.k.nbytes
            resident.table[:, 2:] -= full
            self._turn_front(heads.positions)
        self._front.put(layer, resident)
        return resident.attend(layer, heads)

    def _turn_front(self, position: Tensor) -> None:
        """Moves all layers' sinks to where the query at `position` ([1]) sees them; in mode `evict` they stay."""
        if self._front is not None and self.options.mode == "faithful" and self.options.sinks:
            keys = self._sinks.flatten(0, 1)
            moved = self.model.move(keys, self._gap(position).expand(len(keys)))
            self._front.keys.copy_(moved.view_as(self._sinks))

    def replayed(self, count: int, position: int) -> None:
        """Slides the caches as the device did, and mends the sinks.

        A step that was begun and not asked for has overwritten the oldest recent token, which no later step sees.
        """
        super().replayed(count, position)
        if self._front is None:
            return
        self._turn_front(torch.full((1,), position + count - 1, device=self._front.keys.device))
        for layer, cache in enumerate(self.cache):
            self._slide(cache)
            self._front.copy_into(cache, layer)

    def capture_key(self) -> Hashable:
        """Changes with the window, which may be a share of the prompt; mode `ashape` decodes without one."""
        return None if self.options.mode == "ashape" else self.window

    def tokens_requested(self) -> list[int]:
        """Sinks and window; everything in mode `ashape`, which saves work, not memory."""
        if self.options.mode == "ashape":
            return super().tokens_requested()
        return [min(self.prompt_len, self.options.sinks + self.window)] * self.model.shape.layers

    def prefill_pairs(self, rows: int) -> int:
        """Pairs within sinks and window; dense in mode `evict`."""
        if self.options.mode == "evict":
            return super().prefill_pairs(rows)
        seen = self.options.sinks + self.window
        return super().prefill_pairs(min(rows, seen)) + max(0, rows - seen) * seen

    def extra_bytes(self) -> int:
        """Bytes of the sinks' keys at their original positions, and of the sinks that replayed steps take from."""
        replays = [] if self._front is None else [self._front.keys, self._front.values]
        return sum(keys.nbytes for keys in (self._sinks, *replays))


class Front:
    """The sinks of all layers, from where every replayed step copies them in front of the window.

    Attributes:
        keys, values: [layers, sinks, kv_heads, head_dim], the keys as the next token meets them.
    """

    def __init__(self, caches: Sequence[LayerCache], sinks: int) -> None:
        """
        Args:
            caches: a layer each, not empty. sinks: tokens to hold of each.
        """
        like = caches[0].keys
        self.keys, self.values = like.new_empty((2, len(caches), sinks, *like.shape[1:]))
        pairs = zip(self.keys, self.values, strict=True)
        self._addresses = torch.tensor([[part.data_ptr() for part in pair] for pair in pairs], device=like.device)
        self._block = torch.zeros(1, dtype=torch.int64, device=like.device)

    @torch.inference_mode()
    def take(self, caches: Sequence[LayerCache]) -> None:
        """Copies the sinks out of a request's caches."""
        sinks = self.keys.shape[1]
        self.keys.copy_(torch.stack([cache.keys[:sinks] for cache in caches]))
        self.values.copy_(torch.stack([cache.values[:sinks] for cache in caches]))

    def put(self, layer: int, resident: ResidentCaches) -> None:
        """Copies the sinks to where the layer's cache begins now."""
        if sinks := self.keys.shape[1]:
            resident.fetch(layer, self._block, self._addresses[layer], self.keys, sinks)

    def copy_into(self, cache: LayerCache, layer: int) -> None:
        """The same from the host."""
        sinks = self.keys.shape[1]
        cache.keys[:sinks], cache.values[:sinks] = self.keys[layer], self.values[layer]
