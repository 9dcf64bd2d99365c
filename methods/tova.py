"""TOVA (Oren et al., arXiv 2401.06104): a cache of fixed size; what the newest query looks at least goes.

A token is worth the attention that the newest query pays to it, mean over all query heads, so a layer's heads keep the
same tokens. The prefill is one reduction, by the prompt's last query; in decode, one token goes for each that comes.

Interpretations:
- nothing is protected, the newest token and the sinks neither, as in the authors' code;
- tokens of a question behind the prompt come in one by one, as generated ones do;
- a share as budget is one of the prompt; scores are float32, and of equal ones the earlier token stays.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from harness.engine.method import ModelContext
from harness.engine.replay.eviction import LowestOut
from harness.engine.replay.replay import Replay
from harness.engine.step import Heads
from harness.options import Budget, OptionSet
from methods.common.evicting import Evicting
from methods.common.scores import head_attention


class Tova(Evicting):
    """Keeps what the newest query looks at."""

    name = "tova"
    summary = "TOVA: each layer keeps the keys and values that the newest query attends to, in decode too"
    parallel = True

    class Options(Evicting.Options):
        """How much stays."""

        budget: Budget = Field(0.25, description="tokens that a layer holds, new ones included; the authors' code: 512")

    options: Options

    def __init__(self, options: OptionSet, model: ModelContext) -> None:
        """As `Method`."""
        super().__init__(options, model)
        self._replay = LowestOut()

    def evicts_in_decode(self) -> bool:
        """The cache holds no more than the budget, ever."""
        return True

    def replay(self) -> Replay | None:
        """Every step the token goes that is looked at least: by one device's heads, which is all that a kernel sees."""
        shape = self.model.shape
        if self.model.ranks.size > 1:
            return None
        self._replay.prepare(self.cache, shape.heads, [self.budget(layer) for layer in range(shape.layers)])
        return self._replay

    def extra_bytes(self) -> int:
        """Bytes of what recorded steps rate tokens by."""
        return self._replay.nbytes

    def looks(self) -> int:
        """At the last one."""
        return 1

    def score(self, layers: range, heads: Heads) -> Tensor:
        """Attention of the last query, mean over all heads of a layer, [layers, n]."""
        attention = head_attention(heads.q[-1:], heads.k)
        return self.model.ranks.mean(attention.view(len(layers), -1, attention.shape[1]).mean(1))
