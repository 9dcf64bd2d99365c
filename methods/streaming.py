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
window keys keep their original rotation; only the few sink keys are rotated anew for each query, at the distance they
have in the cache. This gives the paper's re-indexed positions without rotating the whole cache at every step.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from harness.options import Budget, OptionSet, window_tokens
from harness.rows import Heads, Step
from methods.band import band_attention, shifted_band_attention
from methods.base import Method


class Streaming(Method):
    """Keeps sinks and recent tokens."""

    name = "streaming"
    summary = "StreamingLLM: attention sinks and recent tokens; modes faithful, evict, ashape"
    rotated = False
    nothing = MappingProxyType({"window": "1"})

    class Options(OptionSet):
        """How much stays, and which of the three variants."""

        mode: Literal["faithful", "evict", "ashape"] = Field("faithful", description="which variant, see the module")
        sinks: Annotated[int, Field(ge=0)] = Field(4, description="first tokens that all see; paper: 4")
        window: Budget = Field(512, description="recent tokens, the newest included; the authors' code: 512")

    options: Options

    def begin(self, prompt_len: int, max_new_tokens: int) -> None:
        """Turns the window into tokens of this prompt and forgets the sinks."""
        super().begin(prompt_len, max_new_tokens)
        self.window = window_tokens(self.options.window, prompt_len, prompt_len + max_new_tokens)
        self._sink_keys: dict[int, Tensor] = {}

    def attend(self, layer: int, heads: Heads, step: Step) -> Tensor:
        """Rotates, stores what stays, and attends as the mode says."""
        rotated = Heads(self._rotate(heads.q, heads), self._rotate(heads.k, heads), heads.v, heads.positions)
        if step.phase == "prefill":
            return self._prefill(layer, heads, rotated)
        if self.options.mode == "ashape":
            return super().attend(layer, rotated, step)
        rows = zip(heads.single(), rotated.single(), strict=True)
        return torch.cat([self._decode(layer, plain, turned) for plain, turned in rows])

    def _rotate(self, x: Tensor, heads: Heads) -> Tensor:
        return self.model.rotate(x, heads.positions)

    def _prefill(self, layer: int, heads: Heads, rotated: Heads) -> Tensor:
        attention, sinks = self.model.attention, self.options.sinks
        q, k, v = rotated.q, rotated.k, rotated.v
        if self.options.mode == "ashape":
            self.cache[layer].append(k, v, heads.positions)
            if len(q) <= self.window:
                return attention.causal(q, k, v)
            return band_attention(attention, q, k, v, sinks, self.window)
        self._store(layer, heads, rotated)
        if self.options.mode == "evict" or len(q) <= sinks + self.window:
            return attention.causal(q, k, v)
        at_sinks = heads.positions.clamp(max=sinks + self.window - 1)
        q_sink = self.model.rotate(heads.q, at_sinks)
        return shifted_band_attention(q, q_sink, k, k[:sinks], v, self.window)

    def _store(self, layer: int, heads: Heads, rotated: Heads) -> None:
        """Puts sinks and window into the cache, and the sinks' keys aside without rotation."""
        sinks, n = self.options.sinks, len(heads.positions)
        index = torch.arange(n, device=heads.positions.device)
        index = index[(index < sinks) | (index >= n - self.window)]
        self.cache[layer].append(rotated.k[index], rotated.v[index], heads.positions[index])
        self._sink_keys[layer] = heads.k[:sinks].clone()

    def _decode(self, layer: int, heads: Heads, rotated: Heads) -> Tensor:
        """One token: it comes in, the oldest recent one goes."""
        cache, sinks = self.cache[layer], self.options.sinks
        cache.append(rotated.k, rotated.v, heads.positions)
        if len(self._sink_keys[layer]) < sinks:
            self._sink_keys[layer] = torch.cat((self._sink_keys[layer], heads.k))
        surplus = cache.length - sinks - self.window
        if surplus > 0:
            cache.slide(sinks, surplus)
        if self.options.mode == "faithful" and sinks:
            self._shift_sinks(layer, heads.positions)
        return self.model.attention.causal(rotated.q, cache.keys, cache.values)

    def _shift_sinks(self, layer: int, position: Tensor) -> None:
        """Rotates the sinks' keys to where they lie in the cache, seen from the query at `position` ([1])."""
        keys, cache = self._sink_keys[layer], self.cache[layer]
        gap = position - position.clamp(max=self.options.sinks + self.window - 1)
        cache.keys[: len(keys)] = self.model.rotate(keys, torch.arange(len(keys), device=keys.device) + gap)

    def static_decode(self) -> bool:
        """Mode `ashape`: there decode is full attention. Elsewhere every token moves the window on the host."""
        return self.options.mode == "ashape"

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
        """Bytes of the sinks' keys without rotation."""
        return sum(keys.nbytes for keys in self._sink_keys.values())
