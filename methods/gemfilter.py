"""GemFilter (Shi et al., arXiv 2409.17422): an early layer finds what matters, and the model reads that as its prompt.

A first pass takes the whole prompt through the first layers and stores nothing. There the last query's raw products
with all keys, summed over heads and smoothed over neighbours, say which tokens matter. A second pass reads only those,
in their order, as a prompt of its own: positions count from 0 again. TTFT holds both passes.

Interpretations:
- the last token is always read, since the answer follows it; the authors' code protects nothing (`last=0`);
- where the budget is the whole prompt there is nothing to find, and no first pass;
- products are float32 when they are summed, and of equal ones the earlier token is read.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from harness.engine.method import FirstLayers, Method
from harness.engine.replay.replay import Replay
from harness.engine.shape import ModelShape
from harness.engine.step import Heads
from harness.errors import InputError
from harness.options import Budget, OptionSet, budget_tokens
from methods.common.best import best
from methods.common.evicting import last_stay
from methods.common.schedule import scaled_layers
from methods.common.scores import head_dots, pooled


class GemFilter(Method):
    """Reads twice: all of it in the first layers, then a part of it in all of them."""

    name = "gemfilter"
    summary = "GemFilter: the whole prompt through the first layers, then what they find through the whole model"
    parallel = True
    nothing = {"budget": "1"}

    class Options(OptionSet):
        """How much is read again, and where it is found."""

        budget: Budget = Field(0.25, description="prompt tokens that the whole model reads; paper: 1024")
        layer: Annotated[int, Field(ge=0)] | None = Field(
            None, description="layer whose last query chooses; paper: 13 of 32"
        )
        kernel: Annotated[int, Field(ge=1)] = Field(5, description="tokens that products are averaged over, odd")
        last: Annotated[int, Field(ge=0)] = Field(1, description="last tokens that are always read; authors' code: 0")

    options: Options

    @classmethod
    def check(cls, options: OptionSet, shape: ModelShape) -> None:
        """Raises `InputError` for a layer that the model lacks and a budget or kernel that cannot be."""
        assert isinstance(options, cls.Options)
        if options.layer is not None and options.layer >= shape.layers:
            raise InputError(f"{cls.name}: layer={options.layer}, but the model has {shape.layers} layers")
        if options.kernel % 2 == 0:
            raise InputError(f"{cls.name}: kernel={options.kernel} is even; a token must be in the middle")
        if isinstance(options.budget, int) and options.budget <= options.last:
            raise InputError(f"{cls.name}: budget={options.budget} leaves nothing beside last={options.last}")

    @property
    def layer(self) -> int:
        """Where the first pass ends."""
        (scaled,) = scaled_layers((13,), 32, self.model.shape.layers)
        return scaled if self.options.layer is None else self.options.layer

    def prompt(self, ids: Tensor, run: FirstLayers) -> Tensor:
        """What the first pass finds, in its order."""
        count = self._read(len(ids))
        if count == len(ids):
            return ids
        heads = run(ids, self.layer)
        with self.model.part("score"):
            scores = self.score(heads)
        with self.model.part("select"):
            return ids[best(scores, count)[0]]

    def _read(self, prompt_len: int) -> int:
        """Tokens that are read again, of so many."""
        return min(prompt_len, max(budget_tokens(self.options.budget, prompt_len), self.options.last))

    def score(self, heads: Heads) -> Tensor:
        """The last query's q . k, summed over heads, mean over neighbours; infinity for the last tokens: [1, n]."""
        products = self.model.ranks.sum_(head_dots(heads.q[-1:], heads.k).float().sum(0))
        smooth = pooled(products, self.options.kernel, "avg")
        return last_stay(smooth[:, : len(heads) - self.options.last], self.options.last)

    def replay(self) -> Replay:
        """Every token attends to everything that was read."""
        return self.dense_replay

    def asked_share(self, prompt_len: int) -> float:
        """The budget's, or that of the last tokens where they are more."""
        return self._read(prompt_len) / prompt_len
