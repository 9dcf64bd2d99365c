"""Queries that are yet to come, as a normal distribution (Expected Attention, Devoto et al., arXiv 2510.00636)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Move = Callable[[Tensor, Tensor], Tensor]
"""As `harness.engine.method.ModelContext.move`."""


def future_queries(q: Tensor, positions: Tensor, move: Move, horizon: int) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the queries that would follow, if they were like these at the positions to come.

    Args:
        q: [n, heads, d], rotated to their positions.
        positions: [n] int64, ascending.
        move: rotates queries further on, or back.
        horizon: positions behind the last one that the mean rotation is taken over.

    Returns:
        [heads, d] and [heads, d, d], float32.
    """
    unrotated = move(q, -positions)
    mean = unrotated.mean(0, dtype=torch.float32)
    apart = (unrotated - mean.to(q.dtype)).transpose(0, 1)
    covariance = (apart.transpose(1, 2) @ apart).float() / len(q)
    turn = mean_rotation(q.shape[2], positions[-1] + 1, move, horizon)
    return mean @ turn, turn.T @ covariance @ turn


def mean_rotation(d: int, start: Tensor, move: Move, horizon: int) -> Tensor:
    """Mean of the rotations to `horizon` positions from `start` ([] int64) on, to be multiplied from the right: [d, d].

    Row i is what becomes of the i-th basis vector.
    """
    basis = torch.eye(d, device=start.device).expand(horizon, d, d)
    return move(basis, start + torch.arange(horizon, device=start.device)).mean(0)


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
    keys = k.transpose(0, 1)
    dots = mean.to(k.dtype).view(kv_heads, -1, d) @ keys.transpose(1, 2)
    logits: Tensor = dots.float() / d**0.5
    if covariance is not None:
        # One query head of each group at a time: together they would take the memory of all queries.
        each = covariance.to(k.dtype).view(kv_heads, -1, d, d).unbind(1)
        logits += torch.stack([((keys @ one).float() * keys).sum(2) for one in each], 1) / (2 * d)
    return logits
