"""A-shape (Xiao et al., arXiv 2309.17453, as MInference, arXiv 2407.02490, names it): a prefill of sinks and a window.

Every row of the prefill attends to the first tokens and to a window of those before it, itself included; the work
outside is not done. All keys and values stay, and decode attends to everything.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from harness.engine.band import banded
from harness.engine.step import Heads
from harness.options import Budget, OptionSet, window_tokens
from methods.common.band import band_pairs
from methods.common.sparse_prefill import SparsePrefill


class AShape(SparsePrefill):
    """Attends to sinks and a window."""

    name = "ashape"
    summary = "A-shape: the prefill attends to the first tokens and a window of recent ones"
    parallel = True
    nothing = MappingProxyType({"window": "1"})

    class Options(OptionSet):
        """How much each row sees."""

        sinks: Annotated[int, Field(ge=0)] = Field(128, description="first tokens that all rows see")
        window: Budget = Field(3968, description="tokens before it that a row sees, itself included")

    options: Options

    def seen(self, n: int) -> int:
        """Tokens that a row sees at most, of a prompt of n."""
        return self.options.sinks + window_tokens(self.options.window, n, n)

    def prefill(self, layer: int, heads: Heads) -> tuple[Tensor, Tensor] | None:
        """Dense where sinks and window hold the prompt."""
        (q, k, v), n, sinks = (heads.q, heads.k, heads.v), len(heads), self.options.sinks
        if n <= (seen := self.seen(n)):
            return None
        out = banded(self.model.attention, q, q, k, v, sinks, seen - sinks)
        return out, torch.full(q.shape[1:2], band_pairs(n, seen))
