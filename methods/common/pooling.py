"""Scores of tokens smoothed over their neighbours, as the methods around SnapKV (arXiv 2404.14469) do it."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d


def pooled(scores: Tensor, kernel: int, pool: Literal["avg", "max"]) -> Tensor:
    """Mean or maximum over `kernel` tokens around each one.

    Args:
        scores: [heads, n] float32.
        kernel: odd. The mean counts zeros beyond both ends, so it damps the first and the last tokens, as the authors'
            code does.
        pool: which.

    Returns:
        [heads, n].
    """
    smooth = avg_pool1d if pool == "avg" else max_pool1d
    return smooth(scores.unsqueeze(1), kernel, stride=1, padding=kernel // 2).squeeze(1)
