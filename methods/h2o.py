"""H2O (Zhang et al., arXiv 2306.14048): heavy hitters, the tokens that all queries attended to most, and recent ones.

Two rules carry the name; `mode` says which one runs:
- `port`: behind the prefill each KV head keeps the last `window` tokens and the best others, as the ports to LongBench;
- `drop`: the authors' cache. Behind the prefill and every new token what exceeds the budget goes, and all that it got
  with it; what stays keeps its sums, and new queries add to them.

Interpretations: a KV head takes the mean over its query heads; nothing is pooled; sums are not divided by the number of
queries that could look, so early tokens get more; in `drop` a question behind the prompt comes in one by one, and a new
token's query counts before anything goes; `budget` counts the window; of equal sums, float32, the earlier token stays.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from harness.engine.step import Heads
from methods.common.evicting import last_stay
from methods.common.summing import Summing


class H2O(Summing):
    """Keeps what was looked at most, and what came last."""

    name = "h2o"
    summary = "H2O: each KV head keeps the keys and values that all queries attended to most, and recent ones"
    parallel = True
    stays = "window"

    class Options(Summing.Options):
        """How much, and how often."""

        mode: Literal["port", "drop"] = Field("port", description="evict once, or behind every token: see the module")
        window: Annotated[int, Field(ge=0)] = Field(32, description="last tokens kept; 0: half the budget; paper: 0")

    options: Options

    def evicts_in_decode(self) -> bool:
        """In mode `drop`."""
        return self.options.mode == "drop"

    def recent(self, layer: int) -> int:
        """How many of a layer's last tokens stay."""
        return self.options.window or self.budget(layer) // 2

    def score(self, layers: range, heads: Heads) -> Tensor:
        """Sums of attention; infinity for the last tokens."""
        sums, window = self.sums(layers[0], heads), self.recent(layers[0])
        return last_stay(sums[:, : sums.shape[1] - window], window)
