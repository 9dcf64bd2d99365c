"""Which prompt tokens each layer kept, as ranges: what a token survival map is drawn from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MOST_RANGES = 4096
"""A record with more ranges would weigh more than the rest of the run; it says nothing instead."""

Ranges = list[list[int]]
"""[start, end) pairs, ascending."""


def kept_spans(positions: Sequence[Tensor], prompt_len: int) -> list[Ranges | None] | None:
    """The kept prompt positions of every layer.

    Args:
        positions: [tokens] int64 a layer, of everything in its cache.
        prompt_len: tokens of the prompt; later ones are left out.

    Returns:
        One entry a layer, None where it is the same as the layer before; None altogether if it is too much.
    """
    layers: list[Ranges | None] = []
    before: Ranges | None = None
    for kept in positions:
        now = ranges(kept[kept < prompt_len])
        layers.append(None if now == before else now)
        before = now
    return layers if sum(len(layer or ()) for layer in layers) <= MOST_RANGES else None


def ranges(positions: Tensor) -> Ranges:
    """Runs of consecutive numbers: [n] int64 -> [[start, end), ...]."""
    values = positions.sort().values.cpu()
    if not len(values):
        return []
    borders = (values[1:] != values[:-1] + 1).nonzero().squeeze(1) + 1
    starts = values[torch.cat((torch.zeros(1, dtype=torch.int64), borders))]
    ends = values[torch.cat((borders - 1, torch.tensor([len(values) - 1])))] + 1
    return [[int(start), int(end)] for start, end in zip(starts, ends, strict=True)]


def every_layer(spans: Sequence[Ranges | None]) -> list[Ranges]:
    """What `kept_spans` returned, with the repeated layers written out."""
    layers: list[Ranges] = []
    for layer in spans:
        layers.append(layers[-1] if layer is None else layer)
    return layers
