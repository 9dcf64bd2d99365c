"""StreamingLLM (Xiao et al., arXiv 2309.17453): attention sinks and a window of recent tokens.

Three variants circulate under the name; `mode` says which one runs:

- `faithful`: every token, of the prompt too, sees the first `sinks` tokens and the last `window` ones, itself
  included, and positions count inside the cache: the oldest recent token directly follows the sinks. The cache never
  holds more.
- `evict`: dense prefill; of the prompt, sinks and recent tokens stay, at their original positions. What follows (a
  question, new tokens) is never evicted. TTFT does not change, and what stays has absorbed the whole prompt, so it
  scores higher.
- `slide`: as `evict`, but the window goes on with every token that follows, a question's too.

A prefill in this shape of which all keys and values stay is `methods.ashape`.

The authors' `recent_size` does not count the newest token, which comes in after they have evicted; `window` does. Their
512 is 513 here, the default.

Rotary attention depends on distances alone. Within the window, distances in the cache equal those in the text, so
window keys keep their original rotation; only for the few sinks is each query rotated back, to the distance that they
have in the cache. This gives the paper's re-indexed positions without rotating the cache at every step.

A cache that is full slides through the memory reserved for new tokens: it begins one token later with every step, and
the sinks are written anew in front of the window. So a replayed step moves addresses on the device and nothing else.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from harness.engine.band import banded
from harness.engine.method import Method, ModelContext
from harness.engine.replay.replay import Replay
from harness.engine.step import Heads, Step
from harness.options import Budget, OptionSet, window_tokens
from methods.common.band import band_pairs
from methods.common.sinks import band, both_ends, nearer, sink_attention, slide
from methods.common.take import take
from methods.replay.streaming import StreamingReplay


class Streaming(Method):
    """Keeps sinks and recent tokens."""

    name = "streaming"
    summary = "StreamingLLM: attention sinks and recent tokens; modes faithful, evict, slide"
    parallel = True
    nothing = MappingProxyType({"window": "1"})

    class Options(OptionSet):
        """How much stays, and which of the variants."""

        mode: Literal["faithful", "evict", "slide"] = Field("faithful", description="which variant, see the module")
        sinks: Annotated[int, Field(ge=0)] = Field(4, description="first tokens that all see; paper: 4")
        window: Budget = Field(
            513, description="recent tokens, the newest included; the authors' recent_size=512 is 513"
        )

    options: Options

    def __init__(self, options: OptionSet, model: ModelContext) -> None:
        super().__init__(options, model)
        reindexed = self.options.mode == "faithful"
        self._slides = reindexed or self.options.mode == "slide"
        self._replay = StreamingReplay(self.options.sinks, model.move if reindexed else None)

    def begin(self, prompt_len: int, max_new_tokens: int) -> None:
        """Turns the window into tokens of this prompt."""
        super().begin(prompt_len, max_new_tokens)
        self.window = window_tokens(self.options.window, prompt_len, prompt_len + max_new_tokens)

    def attend(self, layer: int, heads: Heads, step: Step) -> Tensor:
        """Stores what stays, and attends as the mode says."""
        if step.phase == "prefill":
            return self._prefill(layer, heads)
        if not self._slides or self._holds(step.start + step.count):
            return super().attend(layer, heads, step)
        return self._decode(layer, heads)

    def _holds(self, tokens: int) -> bool:
        """Whether so many tokens fit, so that all of them see each other at the distances of the text."""
        return tokens <= self.options.sinks + self.window

    def _prefill(self, layer: int, heads: Heads) -> Tensor:
        attention, sinks = self.model.attention, self.options.sinks
        q, k, v = heads.q, heads.k, heads.v
        self._store(layer, heads)
        if self.options.mode != "faithful" or self._holds(len(q)):
            return attention.causal(q, k, v)
        q_sink = self.model.move(q, -nearer(heads.positions, sinks, self.window))
        return banded(attention, q, q_sink, k, v, sinks, self.window)

    def _store(self, layer: int, heads: Heads) -> None:
        """Puts sinks and window into the cache."""
        if self._holds(len(heads)):
            self.cache[layer].append(heads.k, heads.v, heads.positions)
            return
        index = both_ends(heads.positions, self.options.sinks, self.window)
        take(self.cache[layer], heads.k, heads.v, heads.positions, index)

    def _decode(self, layer: int, heads: Heads) -> Tensor:
        """Tokens come in, and as many of the oldest recent ones go; several see each other up to themselves."""
        cache, attention, sinks = self.cache[layer], self.model.attention, self.options.sinks
        cache.append(heads.k, heads.v, heads.positions)
        slide(cache, sinks, self.window + len(heads) - 1)
        seen = band(heads.positions, cache.token_positions, sinks, self.window) if len(heads) > 1 else None
        if self.options.mode == "faithful":
            q_sink = self.model.move(heads.q, -nearer(heads.positions, sinks, self.window))
            out = sink_attention(heads.q, q_sink, cache.keys, cache.values, sinks, seen)
        else:
            out = attention.masked(heads.q, cache.keys, cache.values, seen)
        slide(cache, sinks, self.window)
        return out

    def replay(self) -> Replay | None:
        """As soon as all sinks are there; whether a cache is full, and slides, is decided on the device."""
        if not self._slides:
            return self.dense_replay
        if self.cache[0].length < self.options.sinks:
            return None
        self._replay.prepare(self.cache, self.window)
        return self._replay

    def tokens_requested(self) -> list[int]:
        """Sinks and window."""
        return [min(self.prompt_len, self.options.sinks + self.window)] * self.model.shape.layers

    def prefill_pairs(self, rows: int) -> int:
        """Pairs within sinks and window in mode `faithful`; else dense."""
        if self.options.mode != "faithful":
            return super().prefill_pairs(rows)
        return band_pairs(rows, self.options.sinks + self.window)

    def extra_bytes(self) -> int:
        """Bytes of the sinks that replayed steps take from."""
        return self._replay.nbytes
