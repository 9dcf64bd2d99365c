"""The tokens of the highest scores, of equal ones the first: by one rule for all methods, on every device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from harness.engine.hardware import kernels_run


def best(scores: Tensor, count: int) -> Tensor:
    """As many of each head, ascending: [heads, n] float32 -> [heads, count] int64."""
    return best_each(scores, None, count)


def best_of(scores: Tensor, counts: Sequence[int]) -> Tensor:
    """Of every few heads their own number.

    Args:
        scores: [heads, n] float32, without NaN.
        counts: for each `heads / len(counts)` of the heads, one after the other; at most n.

    Returns:
        [heads, max(counts)] int64. As many as count are ascending; what is behind them means nothing.
    """
    if len(set(counts)) == 1:
        return best(scores, counts[0])
    each = torch.tensor(counts).repeat_interleave(len(scores) // len(counts))
    return best_each(scores, each.to(scores.device, non_blocking=True), max(counts))


def best_each(scores: Tensor, counts: Tensor | None, most: int) -> Tensor:
    """Of each head its own number, which the device knows.

    Args:
        scores: [heads, n] float32, without NaN.
        counts: [heads] int64; None for `most` of each.
        most: no head's count is greater; at most n.

    Returns:
        [heads, most] int64. The first `counts` of each row are ascending; what is behind them means nothing.
    """
    if kernels_run(scores.device):
        from harness.engine.kernels.token_select import best_tokens

        tokens: Tensor = best_tokens(scores.contiguous(), counts, most)
        return tokens
    order = torch.sort(scores, stable=True, descending=True).indices[:, :most]
    if counts is None:
        return order.sort(1).values
    left_out = torch.arange(most, device=scores.device) >= counts.unsqueeze(1)
    return order.masked_fill(left_out, scores.shape[1]).sort(1).values
