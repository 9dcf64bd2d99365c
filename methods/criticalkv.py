"""CriticalKV (Feng et al., arXiv 2502.03805): another method's choice, half of it made anew by what values do.

Half of a KV head's budget goes to the tokens that the base method rates highest. The rest goes to those of the highest
(score + 1e-4) * |v W_O|, where the L1 norm is that of what a value adds to the residual stream, mean over the query
heads of the KV head.

Interpretations (kvpress's):
- the base method runs with its own defaults, but Expected Attention leaves the norm of values to this one;
- the first half is rounded down; tokens that the base method always keeps stay here, too;
- Knorm's scores are negative, so under `base=knorm` the second half goes to values that add little: the rule as it is;
- norms and scores are float32, and of equal ones the earlier token stays.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from harness.engine.method import ModelContext
from harness.engine.shape import ModelShape
from harness.engine.step import Heads
from harness.errors import InputError
from harness.options import OptionSet
from methods.common.best import best
from methods.common.evicting import Evicting
from methods.common.scores import output_norms
from methods.expected import Expected
from methods.knorm import Knorm
from methods.snapkv import SnapKV


class CriticalKV(Evicting):
    """Keeps what is looked at, and what matters when it is.

    Attributes:
        base: the other method, of which only budget and scores are used; it stores nothing.
    """

    name = "criticalkv"
    summary = "CriticalKV: another method's choice, half of it by how much a value adds to the output"
    parallel = True

    class Options(Evicting.Options):
        """How much, and whose choice."""

        base: Literal["snapkv", "knorm", "expected"] = Field("snapkv", description="the method whose scores are used")

    def __init__(self, options: OptionSet, model: ModelContext) -> None:
        super().__init__(options, model)
        kind, of_base = _base(options)
        self.base = kind(of_base, model)

    @classmethod
    def check(cls, options: OptionSet, shape: ModelShape) -> None:
        """Raises `InputError` where the base method does."""
        kind, of_base = _base(options)
        try:
            kind.check(of_base, shape)
        except InputError as error:
            raise InputError(f"{cls.name}, by the defaults of its base {error}") from None

    def begin(self, prompt_len: int, max_new_tokens: int) -> None:
        """Begins both."""
        super().begin(prompt_len, max_new_tokens)
        self.base.begin(prompt_len, max_new_tokens)

    def budget(self, layer: int) -> int:
        """The base method's."""
        return self.base.budget(layer)

    def looks(self) -> int:
        """At what the base method does."""
        return self.base.looks()

    def score(self, layers: range, heads: Heads) -> Tensor:
        """The base's scores times what values add; infinity for the base's choice of half the budget."""
        scores = self.base.score(layers, heads)
        chosen = best(scores, self.budget(layers[0]) // 2)
        scores = (scores + 1e-4) * output_norms(heads.v, [self.model.out_weight(layer) for layer in layers])
        return scores.scatter(1, chosen, torch.inf)


def _base(options: OptionSet) -> tuple[type[Evicting], OptionSet]:
    """The base method, and its options."""
    assert isinstance(options, CriticalKV.Options)
    if options.base == "expected":
        return Expected, Expected.Options.model_validate({"budget": options.budget, "vnorm": False})
    kind = SnapKV if options.base == "snapkv" else Knorm
    return kind, kind.Options.model_validate({"budget": options.budget})
