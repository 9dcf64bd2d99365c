"""LazyLLM (Fu et al., arXiv 2407.14057): progressive pruning of single prompt tokens, with a way back in decode.

Scores (eq. 1): after a pruning point's layer, a token is worth the last token's attention to it, averaged over heads.
In the prefill the lowest-rated tokens go no further. In decode every step selects anew from all tokens, and computes
what the prefill did not (`methods.common.reviving`).

Interpretations, where the paper leaves a choice:
- a pruning layer is the first one to hold the pruned set (0-based); the score is taken in the layer before;
- `of`: shares are of all tokens seen so far (default), or of the tokens that reached the pruning point;
- the newest token always stays; nothing else is protected, generated tokens compete like prompt tokens in decode;
- layers and counts default to SlimInfer's, so that the two differ in what they choose and in nothing else; the paper
  publishes no counts, and its drawn schedule is `keep=0.7/0.49/0.343:layers=9/19/28` for 32 layers;
- `revive=false`: dropped tokens are gone, decode attends to all that the prefill kept.
"""

from __future__ import annotations

from collections.abc import Collection
from types import MappingProxyType
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from harness.engine.method import Hook
from harness.engine.shape import ModelShape
from harness.engine.step import Heads, Rows, Step
from harness.errors import InputError
from harness.options import Budget, OptionSet, budget_tokens
from methods.common.best import best
from methods.common.reviving import Reviving
from methods.common.schedule import check_schedule, pruning_layers, requested_tokens
from methods.common.scores import token_attention


class LazyLLM(Reviving):
    """Prunes hidden states token by token, and revives them when decode asks for them."""

    name = "lazyllm"
    summary = "LazyLLM: progressive pruning of prompt tokens, revival from an Aux Cache in decode"
    parallel = True
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

    @classmethod
    def check(cls, options: OptionSet, shape: ModelShape) -> None:
        """Raises `InputError` for layers the model lacks, and for a model too shallow for the default schedule."""
        assert isinstance(options, cls.Options)
        check_schedule(cls.name, options.layers, options.keep, shape)

    @classmethod
    def check_batch(cls, options: OptionSet) -> None:
        """Raises `InputError` with revival: a step would bring in as many rows as each request asks back."""
        assert isinstance(options, cls.Options)
        if options.revive:
            raise InputError(
                f"{cls.name}: requests are not decoded together with revive=true, since decode brings rows back; "
                "set revive=false"
            )

    def pruning_points(self) -> tuple[int, ...]:
        """The option `layers`."""
        return pruning_layers(self.options.layers, self.model.shape.layers)

    def revives(self) -> bool:
        """The option `revive`."""
        return self.options.revive

    def prefill_hooks(self, layer: int) -> Collection[Hook]:
        """Ahead of a pruning layer, where the choice falls."""
        return ["after_layer"] if layer + 1 in self.layers else []

    def after_layer(self, layer: int, rows: Rows, heads: Heads, step: Step) -> Rows:
        """At a pruning point: drops the lowest-rated tokens in the prefill, selects anew in decode."""
        if step.phase == "decode" or layer + 1 not in self.layers:
            return super().after_layer(layer, rows, heads, step)
        chosen = self.choose(layer, heads.q[-1:], heads.k, self.prompt_len)
        if chosen is None:
            return rows
        if self.options.revive:
            self.put_aside(layer + 1, rows, chosen)
        with self.model.part("gather"):
            return rows.select(chosen)

    def choose(self, layer: int, q: Tensor, keys: Tensor, seen: int) -> Tensor | None:
        """The tokens that the query attends to most, ascending, as many as the pruning point keeps."""
        count = self._count(self.layers.index(layer + 1), seen, keys.shape[0])
        if count >= keys.shape[0]:
            return None
        with self.model.part("score"):
            scores = self.model.ranks.mean(token_attention(q, keys))
        with self.model.part("select"):
            scores[-1:].fill_(torch.inf)  # an element by its number would be sent from the host, which waits
            return best(scores.unsqueeze(0), count)[0]

    def counts(self, seen: int) -> list[int]:
        """The keep ratios in tokens, one pruning point behind the other."""
        counts = [seen]
        for point in range(len(self.layers)):
            counts.append(self._count(point, seen, counts[-1]))
        return counts[1:]

    def _count(self, point: int, seen: int, visible: int) -> int:
        """Tokens that a pruning point keeps, of `visible` ones, with `seen` tokens so far in the text."""
        return min(visible, budget_tokens(self.options.keep[point], seen if self.options.of == "prompt" else visible))

    def tokens_requested(self) -> list[int]:
        """The keep ratios in tokens of the prompt."""
        counts = self.counts(self.prompt_len)
        return requested_tokens(self.layers, counts, self.prompt_len, self.model.shape.layers)
