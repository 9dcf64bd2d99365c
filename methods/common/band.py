"""How many pairs of query and key a band has: each query sees the first tokens and a window of the last ones."""

from __future__ import annotations

from harness.engine.method import causal_pairs


def band_pairs(n: int, seen: int) -> int:
    """Query-key pairs of n tokens that see `seen` tokens each, sinks and window, or all there are."""
    return causal_pairs(min(n, seen)) + max(0, n - seen) * seen
