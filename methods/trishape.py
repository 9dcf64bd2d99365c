"""Tri-shape (Li et al., SCBench, arXiv 2412.10319): A-shape, but the prompt's last rows attend to everything."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from harness.engine.method import causal_pairs
from harness.engine.step import Heads
from methods.ashape import AShape
from methods.common.band import band_pairs


class TriShape(AShape):
    """Attends to sinks and a window, and to everything from the prompt's end."""

    name = "trishape"
    summary = "Tri-shape: A-shape, but the prompt's last rows attend to everything"
    parallel = True

    class Options(AShape.Options):
        """How much each row sees."""

        last: Annotated[int, Field(ge=1)] = Field(100, description="last rows, which see everything")

    options: Options

    def prefill(self, layer: int, heads: Heads) -> tuple[Tensor, Tensor] | None:
        """The dense rows replace those that A-shape has."""
        found = super().prefill(layer, heads)
        if found is None:
            return None
        (out, pairs), first = found, max(0, len(heads) - self.options.last)
        out[first:] = self.model.attention.causal(heads.q[first:], heads.k, heads.v)
        dense = causal_pairs(len(heads)) - causal_pairs(first)
        return out, torch.full_like(pairs, band_pairs(first, self.seen(len(heads))) + dense)
