"""Knorm (Devoto et al., arXiv 2406.11430): keys of a small norm are the ones that queries attend to.

Each KV head keeps the tokens whose keys, as they are cached, have the smallest L2 norm. No query is asked and nothing
is protected: neither sinks, whose keys are small anyway, nor a window.

Interpretations: all layers prune alike (the authors skip the first ones on some models); norms are float32, and of
equal ones the earlier token stays.
"""

from __future__ import annotations

from torch import Tensor

from harness.engine.step import Heads
from methods.common.evicting import Evicting
from methods.common.scores import head_norms


class Knorm(Evicting):
    """Keeps small keys."""

    name = "knorm"
    summary = "Knorm: each KV head keeps the tokens whose keys have the smallest norm"
    parallel = True

    def looks(self) -> int:
        """At no query."""
        return 0

    def score(self, layers: range, heads: Heads) -> Tensor:
        """The smaller, the better."""
        return -head_norms(heads.k).T
