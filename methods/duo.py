"""DuoAttention (Xiao et al., arXiv 2410.10819): few KV heads need the whole text, all others sinks and recent tokens.

Which heads are which does not depend on the prompt: every head has a gate, and those below a quantile stream. A
streaming head keeps the first and the last tokens only and lets go of the oldest of the last ones for each that comes,
at original positions. Each head has memory for what it keeps.

Interpretations:
- gates come from a file as the authors publish it (`full_attention_heads.tsv`), or as `harness calibrate duo` trains it
  for any model; `heads=smollm2` and `heads=qwen2.5-coder-1.5b` name those of these two. Without one, heads are rated by
  a training-free score of the prompt at hand (`methods.common.gates.reach`). Then all keys and values are there until
  the last layer has been rated, and only then those of streaming heads go;
- of equal gates the lower layer's and head's counts as the higher; the authors' code draws lots;
- the prefill is dense for every head, as in the authors' code where a prompt comes in one piece;
- tokens that come in together (a question) see all that a head holds and each other, up to themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from types import MappingProxyType
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from harness.engine.cache import HeadTokens
from harness.engine.method import Method, ModelContext
from harness.engine.ragged import RaggedCache
from harness.engine.replay.replay import Replay
from harness.engine.shape import ModelShape
from harness.engine.step import Heads, Step
from harness.options import OptionSet
from methods.common.gates import GateFile, check_gates, full_heads, gates_for, reach
from methods.common.sinks import both_ends
from methods.replay.duo import SinksAndRecent


class Duo(Method):
    """Full heads and streaming heads.

    Attributes:
        full: for each layer, which KV heads keep everything; empty until that is known.
    """

    name = "duo"
    summary = "DuoAttention: some KV heads keep everything, the others sinks and recent tokens"
    parallel = True
    nothing = MappingProxyType({"sparsity": "0"})

    class Options(OptionSet):
        """How many heads stream, which, and what those keep."""

        sparsity: Annotated[float, Field(ge=0, le=1)] = Field(
            0.5, description="share of KV heads that stream; paper: 0.5, without grouped queries 0.75"
        )
        sinks: Annotated[int, Field(ge=0)] = Field(64, description="first tokens of a streaming head; paper: 64")
        recent: Annotated[int, Field(ge=1)] = Field(256, description="last tokens of a streaming head; paper: 256")
        heads: Annotated[GateFile | None, gates_for("duo")] = Field(
            None,
            description="trained gates (smollm2 and qwen2.5-coder-1.5b come along); without them "
            "a training-free score of each prompt",
        )

    options: Options

    def __init__(self, options: OptionSet, model: ModelContext) -> None:
        """As `Method`."""
        super().__init__(options, model)
        self._replay = SinksAndRecent(self.options.sinks, self.options.recent)

    @classmethod
    def check(cls, options: OptionSet, shape: ModelShape) -> None:
        """Raises `InputError` for gates of another model."""
        assert isinstance(options, cls.Options)
        check_gates(cls.name, options.heads, shape)

    def begin(self, prompt_len: int, max_new_tokens: int) -> None:
        """Forgets the last request, and its scores."""
        super().begin(prompt_len, max_new_tokens)
        gates, self._scores, self._count, self._streams = self.options.heads, list[Tensor](), 0, False
        self.full = self._choose(torch.tensor(gates.rows)) if gates else []

    def attend(self, layer: int, heads: Heads, step: Step) -> Tensor:
        """Attends to all that each head holds; what streaming heads are not to keep then goes."""
        if step.phase == "prefill" and self._streams:
            each = zip(heads.k.unbind(1), heads.v.unbind(1), strict=True)
            self._store(layer, (HeadTokens(k, v, heads.positions) for k, v in each))
            return self.model.attention.causal(heads.q, heads.k, heads.v)
        out = super().attend(layer, heads, step)
        if step.phase == "prefill" and not self.full:
            self._rate(heads)
        elif step.phase == "decode" and self._streams:
            self._slide(layer)
        return out

    def _store(self, layer: int, tokens: Iterable[HeadTokens]) -> None:
        """Puts what each head keeps of these tokens into a cache of its own."""
        plain, pairs = self.cache[layer], zip(tokens, self.full[layer], strict=True)
        cache = RaggedCache(plain.spare, plain.most)
        with self.model.part("gather"):
            cache.append_heads([own if full else HeadTokens(*(x[self._ends(x)] for x in own)) for own, full in pairs])
        self.cache[layer] = cache

    def _ends(self, tokens: Tensor) -> Tensor:
        return both_ends(tokens, self.options.sinks, self.options.recent)

    def _rate(self, heads: Heads) -> None:
        """Rates a layer's heads; behind the last layer decides which of all stream."""
        with self.model.part("score"):
            self._scores.append(reach(heads, self.model.move))
        if len(self._scores) < len(self.cache):
            return
        with self.model.part("select"):
            self.full = self._choose(self.model.ranks.gather(torch.stack(self._scores), 1))
        self._scores.clear()
        for layer, cache in enumerate(self.cache if self._streams else ()):
            self._store(layer, cache.heads())

    def _choose(self, gates: Tensor) -> list[list[bool]]:
        """Which heads are full, of those that are here, by the gates of all."""
        every = full_heads(gates, self.options.sparsity)
        self._count, self._streams = sum(map(sum, every)), not all(map(all, every))
        return [self.model.ranks.own_heads(row) for row in every]

    def _slide(self, layer: int) -> None:
        cache = self.cache[layer]
        assert isinstance(cache, RaggedCache)
        pairs = zip(cache.heads(), self.full[layer], strict=True)
        cache.keep_heads([None if full else self._ends(held.positions) for held, full in pairs])

    def replay(self) -> Replay:
        """Heads of different lengths; whether streaming ones are full, and slide, is decided on the device."""
        if not self._streams:
            return self.dense_replay
        self._replay.prepare(self.cache, self.full)
        return self._replay

    def tokens_requested(self) -> list[int]:
        """Mean over a layer's heads, rounded up; everything as long as heads are not rated."""
        if not self.full:
            return super().tokens_requested()
        few = min(self.prompt_len, self.options.sinks + self.options.recent)
        counts = ([self.prompt_len if full else few for full in heads] for heads in self.full)
        return [math.ceil(sum(count) / len(count)) for count in counts]

    def asked_share(self, prompt_len: int) -> float:
        """Of heads that keep everything, and of both ends in the others; how many those are is known before which."""
        heads = self.model.shape.layers * self.model.shape.kv_heads
        full = (heads - math.ceil(self.options.sparsity * (heads - 1))) / heads
        return full + (1 - full) * min(1.0, (self.options.sinks + self.options.recent) / prompt_len)

    def notes(self) -> dict[str, Any]:
        """Whose word it is that heads are full, and for how many."""
        source = "file" if self.options.heads else "training-free score"
        return {"head_roles": source, "full_heads": self._count}
