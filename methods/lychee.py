"""LycheeDecode (Lin et al., arXiv 2602.04541): few KV heads look for tokens, the others read what those have found.

The prefill is dense and everything stays in the cache. In a decode step a retrieval head attends to all that is
there, and hands the tokens that it attends to most to the same head of the next layer. A sparse head attends to those
alone and hands them on. All heads of the first layer are retrieval heads, so every head has something to go by.

Interpretations (the authors publish neither code nor head roles):
- a head is a KV head: its query heads share one set, by the mean (`vote=mean`) or the greatest (`vote=max`) of what
  they pay to a token;
- the newest token is always attended to, and counts in the budget;
- nothing is skipped while the cache fits the budget;
- gates come from a file, a number for each KV head as `harness calibrate lychee` writes it. Retrieval heads are those
  above one half, or a share of the highest, and all of the first layer. Without a file there are no trained roles:
  whole layers look for tokens, evenly spaced, which is how TidalDecode (arXiv 2410.05076) shares a choice among layers;
- tokens that come in together (a question) are taken one by one, each with its own sets.
"""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from harness.engine.method import Method, ModelContext
from harness.engine.replay.replay import Replay
from harness.engine.shape import ModelShape
from harness.engine.step import Heads, Step
from harness.options import Budget, OptionSet, budget_tokens, window_tokens
from methods.common.best import best
from methods.common.gates import GateFile, Gates, check_gates, full_heads, gates_for
from methods.replay.lychee import LycheeReplay

_SHARE = 0.125
"""Of layers that look for tokens where there are no gates."""


class Lychee(Method):
    """Keeps all keys and values, reads few in most heads.

    Attributes:
        retrieves: for each layer, which KV heads look for tokens.
        count: tokens that a sparse head attends to beside the newest one.
    """

    name = "lychee"
    summary = "LycheeDecode: few KV heads read everything, the others the tokens that the same head above them found"
    counted = "attended"
    parallel = True
    takes_sparse = True
    nothing = MappingProxyType({"budget": "1"})

    class Options(OptionSet):
        """How many tokens are handed down, and by which heads."""

        budget: Budget = Field(1024, description="tokens that a sparse head attends to; paper: 1024 to 4096")
        retrieval: Annotated[float, Field(ge=0, le=1)] | None = Field(
            None,
            description="share of KV heads that look for tokens, the first layer's included (paper: 32 of 256); "
            "by itself those with gates above one half, or 0.125 without gates",
        )
        vote: Literal["mean", "max"] = Field("mean", description="what of its query heads' attention rates a token")
        heads: Annotated[GateFile | None, gates_for("lychee")] = Field(
            None,
            description="trained gates (smollm2 and qwen2.5-coder-1.5b come along); without them layers, evenly spaced",
        )

    options: Options

    def __init__(self, options: OptionSet, model: ModelContext) -> None:
        """As `Method`."""
        super().__init__(options, model)
        every = roles(self.options.heads, self.options.retrieval, model.whole)
        self._looking = sum(map(sum, every))
        self.retrieves = [model.ranks.own_heads(row) for row in every]
        self._replay = LycheeReplay(self.retrieves, self.options.vote)

    @classmethod
    def check(cls, options: OptionSet, shape: ModelShape) -> None:
        """Raises `InputError` for gates of another model."""
        assert isinstance(options, cls.Options)
        check_gates(cls.name, options.heads, shape)

    def begin(self, prompt_len: int, max_new_tokens: int) -> None:
        """Turns the budget into tokens."""
        super().begin(prompt_len, max_new_tokens)
        self.total = prompt_len + max_new_tokens
        self.count = max(1, window_tokens(self.options.budget, prompt_len, self.total) - 1)
        self._replay.make_room(self.total, self.count)

    def asked_share(self, prompt_len: int) -> float:
        """Everything for heads that look for tokens, the budget for the others."""
        looks = [head for layer in self.retrieves for head in layer]
        most = sum(looks) / len(looks)
        return most + (1 - most) * budget_tokens(self.options.budget, prompt_len) / prompt_len

    def attend(self, layer: int, heads: Heads, step: Step) -> Tensor:
        """Dense in the prefill; then each token by its own sets, which it takes from layer to layer."""
        if step.phase != "decode":
            return super().attend(layer, heads, step)
        if layer == 0:
            self._sets: list[list[Tensor]] = [[torch.empty(0)] * heads.k.shape[1] for _ in range(len(heads))]
        rows = zip(heads.single(), self._sets, strict=True)
        out = torch.cat([self._decode(layer, row, sets) for row, sets in rows])
        if layer + 1 == len(self.cache):
            self._sets = []
        return out

    def _decode(self, layer: int, row: Heads, sets: list[Tensor]) -> Tensor:
        cache = self.cache[layer]
        cache.append(row.k, row.v, row.positions)
        if cache.length - 1 <= self.count:
            return cache.attend(self.model.attention, row.q)
        newest, out = cache.positions.new_tensor([cache.length - 1]), list[Tensor]()
        groups = row.q[0].view(row.k.shape[1], -1, row.q.shape[2]).unbind()
        each = zip(groups, cache.keys.unbind(1), cache.values.unbind(1), self.retrieves[layer], strict=True)
        for head, (queries, keys, values, retrieves) in enumerate(each):
            if not retrieves:
                tokens = torch.cat((sets[head], newest))
                keys, values = keys[tokens], values[tokens]
            weights = (queries @ keys.T).float().mul(1 / math.sqrt(keys.shape[1])).softmax(-1)
            out.append(weights.to(values.dtype) @ values)
            if retrieves:
                sets[head] = self._best(weights[:, :-1])
        return torch.cat(out).view(1, -1)

    def _best(self, weights: Tensor) -> Tensor:
        """What a retrieval head hands down, [count] int64, by what its query heads pay, [group, n] float32."""
        with self.model.part("select"):
            votes = weights.mean(0) if self.options.vote == "mean" else weights.amax(0)
            return best(votes.unsqueeze(0), self.count)[0]

    def replay(self) -> Replay:
        """Heads attend to all or to what they were handed, and choose, on the device."""
        if self.total - 1 <= self.count:
            return self.dense_replay
        return self._replay

    def decode_bytes(self) -> int:
        """All of retrieval heads, the budget of sparse ones."""
        return sum(map(self._read_bytes, range(len(self.cache))))

    def _read_bytes(self, layer: int) -> int:
        cache, chosen = self.cache[layer], self.retrieves[layer]
        sparse = min(cache.length, self.count + 1)
        tokens = sum(cache.length if retrieves else sparse for retrieves in chosen)
        return cache.resident_nbytes * tokens // (cache.length * len(chosen))

    def extra_bytes(self) -> int:
        """Bytes of what replayed steps choose in."""
        return self._replay.nbytes

    def notes(self) -> dict[str, Any]:
        """Whose word it is that heads are retrieval heads, and for how many."""
        source = "file" if self.options.heads else "evenly spaced layers"
        return {"head_roles": source, "retrieval_heads": self._looking}


def roles(gates: Gates | None, share: float | None, shape: ModelShape) -> list[list[bool]]:
    """Which KV heads of each layer look for tokens; all of the first layer do.

    Args:
        gates: the higher ones do; None for whole layers.
        share: of all heads, about; None for the gates above one half.
        shape: of the model.
    """
    if gates is None:
        count = max(1, round((_SHARE if share is None else share) * shape.layers))
        looking = {number * shape.layers // count for number in range(count)}
        return [[layer in looking] * shape.kv_heads for layer in range(shape.layers)]
    if share is None:
        return [[gate > 0.5 or layer == 0 for gate in row] for layer, row in enumerate(gates.rows)]
    first = torch.full((1, shape.kv_heads), torch.inf)
    chosen = full_heads(torch.cat((first, torch.tensor(gates.rows[1:]).view(-1, shape.kv_heads))), 1 - share)
    return [[True] * shape.kv_heads, *chosen[1:]]
