"""SnapKV (Li et al., arXiv 2404.14469): the prompt's last queries tell which keys and values the answer will need.

The queries of a window at the prompt's end are the observers. A token before the window is worth the attention that it
gets from them; scores are pooled over neighbours, so that what stays are pieces of text and not single tokens. Each KV
head keeps its own best tokens, and the window.

Interpretations, where public code disagrees:
- under grouped-query attention a KV head scores by the mean over its query heads, then pools, and keeps one set (the
  authors' code copies keys and values for every query head);
- scores are float32, and of equal ones the earlier token stays;
- `budget` counts the window. The authors' code keeps 2048 tokens; LongBench's figures were made with `window=32`,
  `kernel=7` and `pool=max`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from harness.engine.shape import ModelShape
from harness.engine.step import Heads
from harness.errors import InputError
from harness.options import Budget, OptionSet
from methods.common.evicting import Evicting, last_stay
from methods.common.scores import pooled, window_attention


class SnapKV(Evicting):
    """Keeps what the last queries look at."""

    name = "snapkv"
    summary = "SnapKV: each KV head keeps the keys and values that the prompt's last queries attend to"
    parallel = True
    stays = "window"

    class Options(Evicting.Options):
        """How much, and who looks."""

        budget: Budget = Field(0.25, description="prompt tokens that each KV head keeps, window included; paper: 2048")
        window: Annotated[int, Field(ge=1)] = Field(32, description="last queries that look, and always stay")
        kernel: Annotated[int, Field(ge=1)] = Field(5, description="tokens that scores are pooled over, odd; 1: none")
        pool: Literal["avg", "max"] = Field("avg", description="how: mean, with zeros beyond the ends, or maximum")

    options: Options

    @classmethod
    def check(cls, options: OptionSet, shape: ModelShape) -> None:
        """Raises `InputError` for a kernel without a middle, and a budget that the window leaves nothing of."""
        assert isinstance(options, cls.Options)
        super().check(options, shape)
        if options.kernel % 2 == 0:
            raise InputError(f"{cls.name}: kernel={options.kernel} is even; a token must be in the middle")

    def looks(self) -> int:
        """Those of the window."""
        return self.options.window

    def score(self, layers: range, heads: Heads) -> Tensor:
        """Pooled attention from the window, mean over the query heads of a KV head; infinity inside the window."""
        window = self.options.window
        scores = window_attention(heads.q[-window:], heads.k)[:, :-window]
        return last_stay(pooled(scores, self.options.kernel, self.options.pool), window)
