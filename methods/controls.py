"""Controls: what a pruning method must beat at equal budget, or its choice of tokens is worth nothing.

`random` and `recent` follow SlimInfer's schedule to the token and differ only in which blocks they keep. `randomkv` is
the control of methods that keep few keys and values of a dense prefill (whose `recent` is `streaming:mode=evict`).
`truncate` gives the same budget of tokens x layers to the head and the tail of the prompt and never shows the model
the rest.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from harness.engine.method import FirstLayers, Method
from harness.engine.replay.replay import Replay
from harness.engine.shape import ModelShape
from harness.engine.step import Heads
from harness.options import OptionSet
from methods.common.evicting import Evicting
from methods.slim import Slim, check_plan


class Random(Slim):
    """SlimInfer's schedule with blocks drawn at random."""

    name = "random"
    summary = "control: slim's schedule, random blocks"
    parallel = True

    class Options(Slim.Options):
        """SlimInfer's, and a seed; decode chooses nothing by relevance."""

        reselect: Literal["C", "A"] = Field("A", description="what decode chooses from; C would choose by relevance")
        seed: int = Field(0, description="of the draw; every pruning point and prompt length draws its own")

    options: Options

    def unit_scores(self, heads: Heads) -> Tensor:
        """Noise, one number for all units of a block, the same for the same seed, prompt length and number of rows."""
        block, unit = self.options.block, self.options.unit
        noise = torch.Generator().manual_seed(hash((self.options.seed, self.prompt_len, len(heads))) % 2**63)
        blocks = torch.rand(-(-len(heads) // block), generator=noise)
        return blocks.repeat_interleave(block // unit)[: -(-len(heads) // unit)].to(heads.k.device)


class Recent(Slim):
    """SlimInfer's schedule keeping the newest blocks."""

    name = "recent"
    summary = "control: slim's schedule, newest blocks"
    parallel = True

    class Options(Slim.Options):
        """SlimInfer's; decode chooses nothing by relevance."""

        reselect: Literal["C", "A"] = Field("A", description="what decode chooses from; C would choose by relevance")

    def unit_scores(self, heads: Heads) -> Tensor:
        """The later, the better."""
        return torch.arange(-(-len(heads) // self.options.unit), dtype=torch.float32, device=heads.k.device)


class RandomKV(Evicting):
    """Keys and values drawn at random."""

    name = "randomkv"
    summary = "control: a dense prefill of which each KV head keeps tokens at random"
    parallel = True

    class Options(Evicting.Options):
        """How much stays, and a seed."""

        seed: int = Field(0, description="of the draw; every layer, KV head and prompt length draws its own")

    options: Options

    def looks(self) -> int:
        """At no query."""
        return 0

    def score(self, layers: range, heads: Heads) -> Tensor:
        """Noise, the same for the same seed, layer and number of tokens."""
        return torch.cat([self._noise(layer, len(heads.k)) for layer in layers]).to(heads.k.device)

    def _noise(self, layer: int, count: int) -> Tensor:
        noise = torch.Generator().manual_seed(hash((self.options.seed, layer, count)) % 2**63)
        return self.model.ranks.own(torch.rand(self.model.whole.kv_heads, count, generator=noise))


class Truncate(Method):
    """Cuts the middle out of the prompt before the model sees it."""

    name = "truncate"
    summary = "control: head and tail of the prompt, with slim's budget of tokens x layers"
    parallel = True
    nothing = Slim.nothing

    class Options(Slim.Options):
        """SlimInfer's; only its schedule counts."""

    options: Options

    @classmethod
    def check(cls, options: OptionSet, shape: ModelShape) -> None:
        """Raises `InputError` where SlimInfer would."""
        assert isinstance(options, cls.Options)
        check_plan(cls.name, options, shape)

    def prompt(self, ids: Tensor, run: FirstLayers) -> Tensor:
        """First and last halves of as many tokens as SlimInfer keeps a layer on average; positions count anew."""
        plan = Slim(self.options, self.model)
        plan.begin(len(ids), 0)
        kept = sum(plan.tokens_requested()) // self.model.shape.layers
        return torch.cat((ids[: kept - kept // 2], ids[len(ids) - kept // 2 :])) if kept < len(ids) else ids

    def asked_share(self, prompt_len: int) -> float:
        """The schedule's, to the token."""
        return Method.asked_share(Slim(self.options, self.model), prompt_len)

    def replay(self) -> Replay:
        """Every token attends to everything that was shown."""
        return self.dense_replay
