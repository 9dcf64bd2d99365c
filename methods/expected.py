"""Expected Attention (Devoto et al., arXiv 2510.00636): what will queries that are yet to come attend to?

Before rotation, a head's queries are taken for normally distributed; mean and covariance are those of the prompt,
turned by the mean rotation of the positions to come. The expected exp(q k / sqrt(d)) then has a closed form: keys are
rated by its softmax, times the norm of their values.

Interpretations, where the paper leaves it open (the authors' kvpress is the guide):
- the first `sinks` tokens always stay, of the budget; they count neither as queries nor in the softmax;
- the covariance is divided by the number of queries; probabilities are averaged over the query heads of a KV head;
- products are in the model's precision, scores float32, and of equal ones the earlier token stays.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from harness.engine.step import Heads
from methods.common.evicting import Evicting
from methods.common.future import Turns, expected_logits, future_queries, turns
from methods.common.scores import head_norms


class Expected(Evicting):
    """Keeps what later queries would look at."""

    name = "expected"
    summary = "Expected Attention: each KV head keeps what queries yet to come are expected to attend to"
    parallel = True
    stays = "sinks"

    class Options(Evicting.Options):
        """How much, and what is expected."""

        sinks: Annotated[int, Field(ge=0)] = Field(4, description="first tokens that always stay; paper: 4")
        future: Annotated[int, Field(ge=1, le=2**17)] = Field(512, description="positions to come; paper: 512")
        covariance: bool = Field(True, description="whether queries vary; paper: true")
        vnorm: bool = Field(True, description="whether the norm of values counts; paper: true")
        eps: Annotated[float, Field(ge=0)] = Field(0.0, description="added to probabilities; the leaderboard's: 0.01")

    options: Options

    def begin(self, prompt_len: int, max_new_tokens: int) -> None:
        """Forgets the last prompt's rotations."""
        super().begin(prompt_len, max_new_tokens)
        self._turns: Turns | None = None

    def score(self, layers: range, heads: Heads) -> Tensor:
        """Expected probabilities times norms, mean over the query heads of a KV head; infinity for the sinks."""
        options, sinks = self.options, self.options.sinks
        queries, keys, values = heads.q[sinks:], heads.k[sinks:], heads.v[sinks:]
        rotations = self._turns or turns(queries, heads.positions[sinks:], self.model.move, options.future)
        self._turns = rotations if layers.stop < self.model.shape.layers else None
        mean, covariance = future_queries(queries, rotations)
        logits = expected_logits(keys, mean, covariance if options.covariance else None)
        scores = logits.softmax(2).mean(1) + options.eps
        scores = scores * head_norms(values).T if options.vnorm else scores
        return pad(scores, (sinks, 0), value=torch.inf)
