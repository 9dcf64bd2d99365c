"""SlimInfer (Long et al., arXiv 2508.06447): progressive pruning of prompt blocks between the middle layers.

At a pruning layer the prompt is cut into blocks of 64 tokens, a block into units of 8. The last queries rate the
units, a block counts as much as its best unit, and the best blocks that fit the budget go on; the first block
(attention sink) and the last one always do. Survivors keep order and positions. The choice falls after the attention of
the layer before, so its feed forward already runs on survivors only. In decode that layer may choose again
(`methods.common.reselecting`).

Interpretations, where the paper leaves a choice:
- `score`: relevance is normalised, by each token's attention from that of the last `w` queries which wants it most;
  `methods.common.blocks` has the other readings, and what became of the literal one;
- the last, partial block stays, inside the budget;
- blocks are rated by those of the prompt's last `w` queries that are left. All are at the first pruning point; behind
  it, where the last block is shorter than `w`, those of the block before it are gone if that block is, and then fewer
  queries rate, never other ones;
- budgets may be shares of the prompt, so that short prompts are pruned at all;
- `ff=all` runs the feed forward of the layer before on every row, as a reading of the paper's figure allows;
- `reselect=A` is the stricter reading of decode: layers behind a pruning point hold just what they attend to, so
  nothing is left to choose there. `C` chooses in the layers ahead, where the choice fell;
- generated tokens are never pruned.
"""

from __future__ import annotations

from collections.abc import Collection
from types import MappingProxyType
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from harness.engine.method import Hook, ModelContext
from harness.engine.shape import ModelShape
from harness.engine.step import Heads, Rows, Step
from harness.errors import InputError
from harness.options import Budget, OptionSet
from methods.common.blocks import Relevance, best_blocks, block_maxima, unit_scores
from methods.common.reselecting import Reselecting
from methods.common.schedule import budgets_in_tokens, check_schedule, pruning_layers, requested_tokens


class Slim(Reselecting):
    """Prunes hidden states block by block during the prefill; later layers never see what was dropped."""

    name = "slim"
    summary = "SlimInfer: progressive pruning of prompt blocks, feed forward on survivors"
    parallel = True
    takes_sparse = True
    nothing = MappingProxyType({"budgets": "1/1/1"})

    class Options(Reselecting.Options):
        """SlimInfer's settings; the defaults are the ones that measured best on the embedded model."""

        budgets: tuple[Budget, ...] = Field(
            (0.75, 0.375, 0.25), description="prompt tokens kept from each pruning layer on; paper: 8192/4096/2048"
        )
        layers: tuple[int, ...] | None = Field(
            None, description="first layer to hold each pruned set; paper: 10/20/30 of 32"
        )
        score: Relevance = Field(
            "query_peak",
            description="relevance: token softmax (mean, best head or best query), over units, or |q.k|",
        )
        votes: Annotated[int, Field(ge=1)] = Field(1, description="last layers ahead of a choice that rate, on average")
        w: Annotated[int, Field(ge=1)] = Field(32, description="last queries that rate the blocks; paper: 4")
        sink: Annotated[int, Field(ge=0)] = Field(1, description="first blocks that always stay")
        tail: Annotated[int, Field(ge=1)] = Field(1, description="last blocks that always stay")
        ff: Literal["survivors", "all"] = Field("survivors", description="rows of the feed forward at a pruning point")
        reselect: Literal["C", "A"] = Field("C", description="what decode chooses from, see the module")

    options: Options

    def __init__(self, options: OptionSet, model: ModelContext) -> None:
        super().__init__(options, model)
        self.layers = pruning_layers(self.options.layers, model.shape.layers)
        votes, places = self.options.votes, reversed([*enumerate(self.layers)])
        # The place among the budgets of the choice that a layer votes on; the last that votes is ahead of it.
        self._choices = {layer: at for at, first in places for layer in range(max(0, first - votes), first)}

    @classmethod
    def check(cls, options: OptionSet, shape: ModelShape) -> None:
        """Raises `InputError` for layers the model lacks and token budgets that cannot hold sink and tail."""
        assert isinstance(options, cls.Options)
        check_plan(cls.name, options, shape)

    def begin(self, prompt_len: int, max_new_tokens: int) -> None:
        """Turns the budgets into tokens of this prompt; sink and tail always fit."""
        super().begin(prompt_len, max_new_tokens)
        self._votes: list[Tensor] = []
        least = (self.options.sink + self.options.tail) * self.options.block
        self.budgets = [max(least, tokens) for tokens in budgets_in_tokens(self.options.budgets, prompt_len)]

    def tokens_requested(self) -> list[int]:
        """The budgets, in tokens."""
        return requested_tokens(self.layers, self.budgets, self.prompt_len, self.model.shape.layers)

    def asked_share(self, prompt_len: int) -> float:
        """Of whole blocks that fit each budget; the last one of a prompt may be short, and stays."""
        self.begin(prompt_len, 1)
        kept, now, block, depth = list[int](), prompt_len, self.options.block, self.model.shape.layers
        for tokens in self.budgets:
            short = -now % block
            now = now if tokens >= now else (tokens + short) // block * block - short
            kept.append(now)
        return sum(requested_tokens(self.layers, kept, prompt_len, depth)) / (prompt_len * depth)

    def prefill_hooks(self, layer: int) -> Collection[Hook]:
        """Where layers vote, and ahead of a pruning layer, where the choice falls."""
        where: Hook = "after_attention" if self.options.ff == "survivors" else "after_layer"
        return [where] if layer in self._choices else []

    def after_attention(self, layer: int, rows: Rows, heads: Heads, step: Step) -> Rows:
        """Drops rows before the feed forward of the layer ahead of a pruning layer."""
        return self._prune(layer, rows, heads, step) if self.options.ff == "survivors" else rows

    def after_layer(self, layer: int, rows: Rows, heads: Heads, step: Step) -> Rows:
        """Drops rows after that feed forward instead, with `ff=all`."""
        return self._prune(layer, rows, heads, step) if self.options.ff == "all" else rows

    def _prune(self, layer: int, rows: Rows, heads: Heads, step: Step) -> Rows:
        at = self._choices.get(layer) if step.phase == "prefill" else None
        if at is None:
            return rows
        budget, chosen_here = self.budgets[at], layer + 1 == self.layers[at]
        if budget >= len(rows):
            if chosen_here:
                self.keep_whole(layer)
            return rows
        with self.model.part("score"):
            self._votes.append(self.unit_scores(heads))
        return self._chosen(layer, rows, budget) if chosen_here else rows

    def _chosen(self, layer: int, rows: Rows, budget: int) -> Rows:
        block, count = self.options.block, len(rows)
        with self.model.part("select"):
            scores, units = self._counted()
            chosen, index = best_blocks(
                scores, (budget + -count % block) // block, block, count, self.ends, units=units
            )
        if self.options.reselect == "C":
            self.copy_out(layer, chosen, index)
        with self.model.part("gather"):
            return rows.select(index)

    def _counted(self) -> tuple[Tensor, int]:
        """The votes that were cast, of units or, if there are several, of whole blocks; and how many make a block."""
        votes, units = self._votes, self.options.block // self.options.unit
        self._votes = []
        if len(votes) == 1:
            return votes[0], units
        return torch.stack([block_maxima(vote, units) for vote in votes]).mean(0), 1

    def unit_scores(self, heads: Heads) -> Tensor:
        """Relevance of each unit of the rows that are left, [ceil(n / unit)]."""
        options, last = self.options, slice(-self.options.w, None)
        raters = self._raters(heads.positions[last])
        return unit_scores(options.score, heads.q[last], heads.k, raters, options.unit, self.model.ranks)

    def _raters(self, positions: Tensor) -> Tensor:
        """Which queries of the last rows rate: those of the prompt's last `w`; [w] int64 -> [w] bool.

        How many those are only the device knows, so the others stay, and count nothing.
        """
        return positions >= self.prompt_len - self.options.w

    @property
    def ends(self) -> tuple[int, int]:
        """As in `Reselecting`: sink and tail."""
        return self.options.sink, self.options.tail


def check_plan(owner: str, options: Slim.Options, shape: ModelShape) -> None:
    """Raises `InputError` where the options do not fit the model or each other; `owner` is the method that has them."""
    check_schedule(owner, options.layers, options.budgets, shape)
    if options.block % options.unit:
        raise InputError(f"{owner}: block={options.block} is not a multiple of unit={options.unit}")
    least = (options.sink + options.tail) * options.block
    for budget in options.budgets:
        if isinstance(budget, int) and budget < least:
            raise InputError(f"{owner}: a budget of {budget} keeps nothing; sink and tail need {least}")
