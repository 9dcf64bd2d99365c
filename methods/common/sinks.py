"""Sinks ahead of a window (StreamingLLM, arXiv 2309.17453): where they are seen, and how a full cache slides."""

from __future__ import annotations

from torch import Tensor

from harness.engine.cache import LayerCache


def nearer(positions: Tensor, sinks: int, window: int) -> Tensor:
    """How many positions nearer the sinks are in the cache than in the text, seen from each position: [n] -> [n]."""
    return positions - positions.clamp(max=sinks + window - 1)


def slide(cache: LayerCache, sinks: int, window: int) -> None:
    """Forgets the oldest tokens behind the sinks until no more than `window` are left there."""
    surplus = cache.length - sinks - window
    if surplus > 0:
        cache.slide(sinks, surplus)
