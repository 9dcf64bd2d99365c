"""XAttention's estimate of attention (Xu et al., arXiv 2503.16428): sums of antidiagonals of tiles of logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from methods.common.block_map import BLOCK, block_sums

_LOGITS = 1 << 27
"""Logits that are there at a time."""


def block_mass(q: Tensor, k: Tensor, stride: int) -> Tensor:
    """Attention between groups of tokens, summed over blocks.

    Args:
        q: [n, heads, d]. k: [n, kv_heads, d].
        stride: tokens a group, a divisor of 128; the last group is filled up with zeros.

    Returns:
        [heads, blocks, blocks] float32, 0 above the diagonal; each row of n / 128 full ones sums to 128 / stride.
    """
    # The last query of a group meets the first key: the dot product of both is the sum of an antidiagonal.
    queries, keys = _groups(q, stride, newest_first=True), _groups(k, stride)
    (heads, groups, _), per_block, scale = queries.shape, BLOCK // stride, 1 / (stride * math.sqrt(q.shape[2]))
    rows, blocks = max(1, _LOGITS // (heads * groups * per_block)) * per_block, -(-groups // per_block)
    parts = []
    for first in range(0, groups, rows):
        mass = _mass(queries[:, first : first + rows], keys[:, : first + rows], scale, per_block)
        parts.append(pad(mass, (0, blocks - mass.shape[2])))
    return torch.cat(parts, 1)


def _groups(x: Tensor, stride: int, *, newest_first: bool = False) -> Tensor:
    """[n, h, d] -> [h, groups, stride * d]."""
    tokens = pad(x, (0, 0, 0, 0, 0, -len(x) % stride)).reshape(-1, stride, *x.shape[1:])
    return (tokens.flip(1) if newest_first else tokens).permute(2, 0, 1, 3).flatten(2)


def _mass(queries: Tensor, keys: Tensor, scale: float, per_block: int) -> Tensor:
    """Rows of blocks that the last groups make: [heads, w, width] and [kv_heads, m, width] -> [heads, rows, blocks]."""
    (heads, w, width), (kv_heads, m, _) = queries.shape, keys.shape
    dots = queries.reshape(kv_heads, -1, width) @ keys.transpose(1, 2)
    logits = dots.view(heads, w, m).float().mul_(scale)
    future = torch.ones((w, w), dtype=torch.bool, device=logits.device).triu(1)
    logits[:, :, m - w :].masked_fill_(future, -torch.inf)
    columns = block_sums(logits.softmax(2), per_block)
    return block_sums(columns.transpose(1, 2), per_block).transpose(1, 2)
