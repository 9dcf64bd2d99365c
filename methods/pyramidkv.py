"""PyramidKV (Cai et al., arXiv 2406.02069): SnapKV's scores, with more tokens for the first layers than for the last.

First layers spread their attention, last ones gather it in few places. Beside the window, the budget B of a layer falls
evenly from 2 B - B // beta in the first layer to B // beta in the last one.

Interpretations, where public code disagrees (this is the authors' code in KVCache-Factory):
- the window of each layer comes on top of what is shared out, so all layers together keep no more than `budget` allows;
- where the first layer would get more than the prompt has, it gets the prompt, and the last one what that leaves;
- the step between layers is rounded down, so a few tokens of the total may be missing;
- a prompt of less than 2 B tokens is pruned evenly, one shorter than the budget not at all;
- all else, ties too, is as in `methods.snapkv`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from methods.snapkv import SnapKV


class PyramidKV(SnapKV):
    """SnapKV with a budget that falls from layer to layer."""

    name = "pyramidkv"
    summary = "PyramidKV: SnapKV's choice, with more keys and values in the first layers and fewer in the last"
    parallel = True

    class Options(SnapKV.Options):
        """SnapKV's, and how steep."""

        beta: Annotated[int, Field(ge=1)] = Field(20, description="the last layer keeps B / beta; paper: 20")

    options: Options

    def budget(self, layer: int) -> int:
        """The layer's part of the pyramid, and the window."""
        window = self.options.window
        shared, past, layers = self.tokens - window, self.prompt_len - window, self.model.shape.layers
        if layers == 1 or past < shared or self.prompt_len < 2 * shared:
            return self.tokens
        most = min(2 * shared - shared // self.options.beta, past)
        step = (2 * (most - shared)) // (layers - 1)
        return window + most - layer * step
