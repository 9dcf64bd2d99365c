"""FastKV (Jo et al., arXiv 2502.01068): one cut of hidden rows in the middle, and SnapKV's choice in every layer.

Behind the feed forward of one layer, tokens that the prompt's last queries looked at there go on, with their positions,
and all others are gone: the layers above have fewer rows. Apart from that, each KV head of each layer keeps the best
keys and values of the rows that the layer had, so the prefill is cut in depth and the cache in length.

Interpretations:
- attention is pooled for each query head, then summed over those of a KV head (`snapkv`: mean first); the cut sums over
  all KV heads;
- `budget` is what each layer stores: a share of the prompt is the authors' "proportional" mode (0.1 below the cut, half
  of what is left above it), a number of tokens is "constant" (512). Shares are rounded up, theirs down;
- a prompt shorter than a budget in tokens is not cut either, as in the authors' code;
- scores are float32, and of equal ones the earlier token stays.
"""

from __future__ import annotations

from collections.abc import Collection
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from harness.engine.method import Hook
from harness.engine.shape import ModelShape
from harness.engine.step import Heads, Rows, Step
from harness.errors import InputError
from harness.options import Budget, OptionSet, budget_tokens
from methods.common.evicting import last_stay
from methods.common.schedule import scaled_layers
from methods.common.scores import head_attention, pooled
from methods.snapkv import SnapKV


class FastKV(SnapKV):
    """SnapKV, and fewer rows above one layer."""

    name = "fastkv"
    summary = "FastKV: one cut of prompt tokens in the middle layers, and SnapKV's choice of keys and values in all"
    parallel = True
    nothing = MappingProxyType({"budget": "1", "keep": "1"})

    class Options(SnapKV.Options):
        """How much is stored, who looks, and where how much goes on."""

        budget: Budget = Field(
            0.1, description="prompt tokens that each KV head stores, window included; paper: 0.1, constant mode 512"
        )
        window: Annotated[int, Field(ge=1)] = Field(8, description="last queries that look, and always stay; paper: 8")
        kernel: Annotated[int, Field(ge=1)] = Field(7, description="tokens that scores are pooled over, odd; paper: 7")
        pool: Literal["avg", "max"] = Field("max", description="how: mean, with zeros beyond the ends, or maximum")
        keep: Budget = Field(0.2, description="prompt tokens that go on behind the cut, window included; paper: 0.2")
        cut: Annotated[int, Field(ge=0)] | None = Field(
            None, description="layer behind whose feed forward the others are dropped; paper: 15 of 32"
        )

    options: Options

    @classmethod
    def check(cls, options: OptionSet, shape: ModelShape) -> None:
        """Raises `InputError` where SnapKV does, for a cut below no layer, and one that only the window passes."""
        assert isinstance(options, cls.Options)
        super().check(options, shape)
        if options.cut is not None and options.cut >= shape.layers - 1:
            raise InputError(
                f"{cls.name}: cut={options.cut} has no layer above it; the model has {shape.layers} layers"
            )
        if isinstance(options.keep, int) and options.keep < options.window:
            raise InputError(f"{cls.name}: keep={options.keep} is less than window={options.window}, which always stay")

    def begin(self, prompt_len: int, max_new_tokens: int) -> None:
        """Turns budget and rows into tokens."""
        super().begin(prompt_len, max_new_tokens)
        self.rows = max(budget_tokens(self.options.keep, prompt_len), self.options.window)

    @property
    def cut(self) -> int:
        """The layer behind which rows are dropped."""
        (scaled,) = scaled_layers((15,), 32, self.model.shape.layers)
        return scaled if self.options.cut is None else self.options.cut

    def score(self, layers: range, heads: Heads) -> Tensor:
        """Attention from the window, pooled, summed over the query heads of a KV head; infinity inside the window."""
        window = self.options.window
        attention = head_attention(heads.q[-window:], heads.k)[:, :-window]
        smooth = pooled(attention, self.options.kernel, self.options.pool)
        return last_stay(smooth.view(heads.k.shape[1], -1, smooth.shape[1]).sum(1), window)

    def prefill_hooks(self, layer: int) -> Collection[Hook]:
        """Every layer evicts, one drops rows."""
        return ["attend", "after_layer"] if layer == self.cut and self.cuts() else ["attend"]

    def after_layer(self, layer: int, rows: Rows, heads: Heads, step: Step) -> Rows:
        """Drops rows behind the layer of the cut, if the prompt is long enough."""
        if step.phase == "decode" or layer != self.cut or not self.cuts():
            return rows
        with self.model.part("score"):
            scores = self.model.ranks.sum_(self.score(range(layer, layer + 1), heads).sum(0, keepdim=True))
        with self.model.part("select"):
            (index,) = self.choose(scores, [self.rows])
        with self.model.part("gather"):
            return rows.select(index)

    def cuts(self) -> bool:
        """Whether the prompt is long enough for a cut."""
        return self.prompt_len > self.rows and self.prompt_len >= self.options.budget

    def tokens_requested(self) -> list[int]:
        """The budgets, and above the cut no more than goes on."""
        above = self.rows if self.cuts() else self.prompt_len
        layers = range(self.model.shape.layers)
        return [min(self.budget(layer), above if layer > self.cut else self.prompt_len) for layer in layers]
