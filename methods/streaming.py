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

from types import MappingProxyType
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from harness.engine.method import Method, ModelContext
from harness.engine.replay.replay import Replay
from harness.engine.step import Heads, Step
from harness.options import Budget, OptionSet, window_tokens
from methods.common.band import band_attention
from methods.common.sinks import nearer, slide
from methods.replay.streaming import StreamingReplay


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
        self._replay = StreamingReplay(self.options.sinks, model.move)

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
        q_sink = self.model.move(q, -nearer(heads.positions, sinks, self.window))
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
        slide(cache, sinks, self.window)
        if self.options.mode == "faithful" and sinks:
            keys, gap = self._sinks[layer, : cache.length], nearer(heads.positions, sinks, self.window)
            cache.keys[: len(keys)] = self.model.move(keys, gap.expand(len(keys)))
        return self.model.attention.causal(heads.q, cache.keys, cache.values)

    def replay(self) -> Replay | None:
        """As soon as all sinks are there; whether a cache is full, and slides, is decided on the device."""
        if self.options.mode == "ashape":
            return self.dense_replay
        if self.cache[0].length < self.options.sinks:
            return None
        self._replay.prepare(self.cache, self.window, self._sinks if self.options.mode == "faithful" else None)
        return self._replay

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
        return self._sinks.nbytes + self._replay.nbytes
