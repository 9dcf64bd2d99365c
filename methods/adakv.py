"""AdaKV (Feng et al., arXiv 2407.11550) on SnapKV's scores: a layer's KV heads share one budget, by where scores are.

Some heads look at a few tokens, others at many. The layer's best tokens are therefore found over all its heads
together, and a head's part of the budget is how many of them are its own. `alpha` of an equal budget is every head's
for certain. Heads then hold different numbers of tokens, and each has memory for just as many.

Interpretations, where public code disagrees:
- scores and groups of query heads as in `snapkv`; the defaults are those of the authors' LongBench scripts, in which
  `normalize` is off (other ports have it on);
- parts are rounded to whole tokens head by head, so a layer may hold a few more or less than its budget: less than half
  a token a head;
- where the budget is the whole prompt nothing is dropped, whatever the parts come to.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from methods.common.best import best_each
from methods.common.ragged import RaggedHeads
from methods.snapkv import SnapKV


class AdaKV(RaggedHeads, SnapKV):
    """SnapKV with a budget for each KV head."""

    name = "adakv"
    summary = "AdaKV: SnapKV with more of a layer's budget for the KV heads whose scores are high"
    parallel = True
    nothing = MappingProxyType({"budget": "1"})

    class Options(SnapKV.Options):
        """How much, who looks, and how evenly it is shared out."""

        kernel: Annotated[int, Field(ge=1)] = Field(7, description="tokens that scores are pooled over, odd; 1: none")
        pool: Literal["avg", "max"] = Field("max", description="how: mean, with zeros beyond the ends, or maximum")
        alpha: Annotated[float, Field(ge=0, le=1)] = Field(0.2, description="share of the budget that is equal for all")
        normalize: bool = Field(False, description="weigh a head's scores by the share that its best tokens have")

    options: Options

    def choose_each(self, scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """For each KV head the best of what was there before the window, as many as are its part, and the window."""
        window = self.options.window
        past, budget = scores[..., :-window], count - window
        shares = self._weighed(past, budget) if self.options.normalize else past
        counts = self._parts(shares, budget) + window
        best = best_each(scores.flatten(0, 1), counts.flatten(), scores.shape[2])
        return best.view(scores.shape), counts

    def _parts(self, scores: Tensor, budget: int) -> Tensor:
        """How many tokens each KV head keeps, `budget` in the mean of a layer."""
        every, alpha = self.model.ranks.gather(scores, 1), self.options.alpha
        found = self.model.ranks.own(owned(every, every.shape[1] * budget), 1)
        return (found.double() * (1 - alpha) + int(alpha * budget)).round().long()

    def _weighed(self, scores: Tensor, budget: int) -> Tensor:
        return scores * (scores.topk(budget).values.sum(2) / scores.sum(2)).unsqueeze(2)

    def tokens_requested(self) -> list[int]:
        """The budgets, and one token more where rounding for each head came to more."""
        both = zip(super().tokens_requested(), self.tokens_kept(), strict=True)
        return [asked + (asked < kept < asked + 1) for asked, kept in both]


def owned(scores: Tensor, count: int) -> Tensor:
    """How many of the best `count` of a layer's scores are each head's; of equal ones the first.

    The device knows the answer, and nothing waits for it: [layers, heads, n] -> [layers, heads] int64.
    """
    if not count:
        return torch.zeros(scores.shape[:2], dtype=torch.int64, device=scores.device)
    last = scores.flatten(1).topk(count, sorted=False).values.amin(1).view(-1, 1, 1)
    above, equal = (scores > last).sum(2), (scores == last).sum(2)
    before = equal.cumsum(1) - equal
    return above + (count - above.sum(1, keepdim=True) - before).clamp(min=0).minimum(equal)
