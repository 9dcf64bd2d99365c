"""Which prompt tokens each layer kept, as ranges: what a token survival map is drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor  # reports read spans without it

MOST_RANGES = 4096
"""A record with more ranges would weigh more than the rest of the run; it says nothing instead."""

Ranges = list[list[int]]
"""[start, end) pairs, ascending."""


def kept_spans(positions: Sequence[Sequence[Tensor]], prompt_len: int) -> list[Ranges | None] | None:
    """The kept prompt positions of every layer.

    Args:
        positions: for each layer what its KV heads hold, [tokens] int64 each; one entry where all hold the same.
        prompt_len: tokens of the prompt; later ones are left out.

    Returns:
        One entry a layer, None where it is the same as the layer before; None altogether if it is too much, or KV heads
        hold different tokens.
    """
    layers: list[Ranges | None] = []
    before: Ranges | None = None
    if any(len(heads) > 1 for heads in positions):
        return None
    for (kept,) in positions:
        now = ranges(kept[kept < prompt_len])
        layers.append(None if now == before else now)
        before = now
    return layers if sum(len(layer or ()) for layer in layers) <= MOST_RANGES else None


def ranges(positions: Tensor) -> Ranges:
    """Runs of consecutive numbers: [n] int64 -> [[start, end), ...]."""
    values = np.sort(positions.cpu().numpy())
    runs = np.split(values, np.flatnonzero(np.diff(values) != 1) + 1)
    return [[int(run[0]), int(run[-1]) + 1] for run in runs if len(run)]


def every_layer(spans: Sequence[Ranges | None]) -> list[Ranges]:
    """What `kept_spans` returned, with the repeated layers written out."""
    layers: list[Ranges] = []
    for layer in spans:
        layers.append(layers[-1] if layer is None else layer)
    return layers
