"""Sinks ahead of a window (StreamingLLM, arXiv 2309.17453): who sees them from where, and how a full cache slides."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from harness.engine.cache import LayerCache
from methods.common.scores import head_dots


def both_ends(tokens: Tensor, sinks: int, window: int) -> Tensor:
    """Indices of the first `sinks` and the last `window` of some tokens, [n, ...] -> [m] int64 ascending."""
    place = torch.arange(len(tokens), device=tokens.device)
    return place if len(place) <= sinks + window else torch.cat((place[:sinks], place[len(place) - window :]))


def nearer(positions: Tensor, sinks: int, window: int) -> Tensor:
    """How many positions nearer the sinks are in the cache than in the text, seen from each position: [n] -> [n]."""
    return positions - positions.clamp(max=sinks + window - 1)


def band(positions: Tensor, tokens: Tensor, sinks: int, window: int) -> Tensor:
    """Which tokens each query sees: the sinks and the last `window` up to itself, [n] x [m] -> [n, m] bool."""
    query = positions.unsqueeze(1)
    return (tokens <= query) & ((tokens < sinks) | (tokens > query - window))


def sink_attention(q: Tensor, q_sink: Tensor, k: Tensor, v: Tensor, sinks: int, seen: Tensor | None) -> Tensor:
    """Attention of few queries that meet the first keys and the others under different rotations.

    Args:
        q, q_sink: [n, heads, d], the same queries rotated for the window and for the sinks.
        k, v: [m, kv_heads, d], the sinks first.
        sinks: how many of those there are, or will be.
        seen: which keys each query sees, [n, m] bool; None for all.

    Returns:
        [n, heads * d].
    """
    logits = torch.cat((head_dots(q_sink, k[:sinks]), head_dots(q, k[sinks:])), 2).float() / math.sqrt(q.shape[2])
    if seen is not None:
        logits = logits.masked_fill(~seen, -torch.inf)
    weights = logits.softmax(-1).to(v.dtype)
    grouped = weights.view(k.shape[1], -1, k.shape[0]) @ v.transpose(0, 1)
    return grouped.view(q.shape[1], *q.shape[::2]).transpose(0, 1).flatten(1)


def slide(cache: LayerCache, sinks: int, window: int) -> None:
    """Forgets the oldest tokens behind the sinks until no more than `window` are left there."""
    surplus = cache.length - sinks - window
    if surplus > 0:
        cache.slide(sinks, surplus)
