"""Queries that are yet to come, as a normal distribution (Expected Attention, Devoto et al., arXiv 2510.00636)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from harness.engine.hardware import kernels_take

Move = Callable[[Tensor, Tensor], Tensor]
"""As `harness.engine.method.ModelContext.move`."""


class Turns(NamedTuple):
    """Rotations of a prompt's queries, the same in all layers.

    Attributes:
        back: to position 0, [n, d], of the dtype of queries: cosines, then sines; halves of a head are paired.
        ahead: mean of those to the positions to come, [d] float32, likewise.
    """

    back: Tensor
    ahead: Tensor


def turns(q: Tensor, positions: Tensor, move: Move, horizon: int) -> Turns:
    """Of queries like `q`, [n, heads, d], at `positions`, [n] int64 ascending, and of `horizon` positions behind them.

    Args:
        q: rotated to their positions.
        positions: where.
        move: rotates queries further on, or back.
        horizon: positions behind the last one that the mean rotation is taken over.
    """
    ahead = positions[-1] + 1 + torch.arange(horizon, device=q.device)
    like = torch.empty(q.shape[2], device=q.device)
    return Turns(_angles(q, -positions, move), _angles(like, ahead, move).mean(0))


def _angles(like: Tensor, by: Tensor, move: Move) -> Tensor:
    # What becomes of a head whose first half is ones, and the other zeros, are cosines and sines.
    d = like.shape[-1]
    ones = like.new_zeros((1, 1, d)).index_fill(2, torch.arange(d // 2, device=like.device), 1)
    return move(ones.expand(len(by), 1, d), by).squeeze(1).contiguous()


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """Rotates heads, [..., d], by `angles`, cosines and then sines, [..., d]; halves of a head are paired."""
    (first, second), (cos, sin) = x.chunk(2, -1), angles.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def future_queries(q: Tensor, turns: Turns) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the queries that would follow, if they were like these at the positions to come.

    Args:
        q: [n, heads, d], rotated to their positions.
        turns: of these queries.

    Returns:
        [heads, d] and [heads, d, d], float32.
    """
    if kernels_take(q):
        from harness.engine.kernels.normal_queries import moments

        found: tuple[Tensor, Tensor] = moments(q, turns.back, turns.ahead)
        return found
    unrotated = turned(q, turns.back.unsqueeze(1))
    mean = unrotated.mean(0, dtype=torch.float32)
    apart = (unrotated - mean.to(q.dtype)).transpose(0, 1)
    covariance = (apart.transpose(1, 2) @ apart).float() / len(q)
    for _ in range(2):  # rows, then columns
        covariance = turned(covariance, turns.ahead).transpose(1, 2)
    return turned(mean, turns.ahead), covariance


def expected_logits(k: Tensor, mean: Tensor, covariance: Tensor | None) -> Tensor:
    """Log of the mean of exp(q k / sqrt(d)) over normally distributed q: mean k / sqrt(d) + k covariance k / (2 d).

    Args:
        k: [n, kv_heads, d].
        mean: [heads, d] float32.
        covariance: [heads, d, d] float32; None for zero.

    Returns:
        [kv_heads, heads / kv_heads, n] float32.
    """
    n, kv_heads, d = k.shape
    if covariance is not None and kernels_take(k):
        from harness.engine.kernels.normal_queries import normal_logits

        found: Tensor = normal_logits(k, mean.contiguous(), covariance.to(k.dtype).contiguous())
        return found
    keys = k.transpose(0, 1)
    dots = mean.to(k.dtype).view(kv_heads, -1, d) @ keys.transpose(1, 2)
    logits: Tensor = dots.float() / d**0.5
    if covariance is not None:
        # One query head of each group at a time: together they would take the memory of all queries.
        each = covariance.to(k.dtype).view(kv_heads, -1, d, d).unbind(1)
        logits += torch.stack([((keys @ one).float() * keys).sum(2) for one in each], 1) / (2 * d)
    return logits
