"""Maps of blocks of 128 tokens, from which sparse prefills choose."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 128


def block_sums(x: Tensor, size: int = BLOCK) -> Tensor:
    """Sums over runs of `size` entries, the last run possibly shorter: [..., n] -> [..., ceil(n / size)]."""
    return pad(x, (0, -x.shape[-1] % size)).reshape(*x.shape[:-1], -1, size).sum(-1)


def block_means(x: Tensor) -> Tensor:
    """Means over blocks of tokens, the last one possibly shorter: [n, heads, d] -> [blocks, heads, d] float32."""
    blocks = pad(x, (0, 0, 0, 0, 0, -len(x) % BLOCK)).reshape(-1, BLOCK, *x.shape[1:])
    means = blocks.mean(1, dtype=torch.float32)
    means[-1] *= BLOCK / (len(x) - (len(means) - 1) * BLOCK)
    return means


def heaviest(scores: Tensor, counts: Tensor) -> Tensor:
    """Which entries of a row are its `counts` best; of equal ones the first are.

    Args:
        scores: [..., m]. counts: [...], on the same device.

    Returns:
        [..., m] bool.
    """
    order = torch.sort(scores, stable=True, dim=-1, descending=True).indices
    stays = torch.arange(scores.shape[-1], device=scores.device) < counts.unsqueeze(-1)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, stays)
