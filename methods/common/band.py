"""Attention of a band: each query sees the first tokens and a window of the last ones before it.

Both go through the kernel that full attention uses, and are joined by their normalisers. So work and memory grow with
n * (sinks + window), never with n * n.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.engine.attention import Attention, joined
from harness.engine.method import causal_pairs


def band_attention(
    attention: Attention, q: Tensor, q_sink: Tensor, k: Tensor, k_sink: Tensor, v: Tensor, window: int
) -> Tensor:
    """Token i attends to tokens j <= i with j < sinks or j > i - window.

    Args:
        attention: the kernel.
        q, q_sink: [n, heads, d], the same queries rotated for the window and for the sinks that lie before it.
        k, v: [n, kv_heads, d]. k_sink: [sinks, kv_heads, d], the first keys rotated for `q_sink`.
        window: last tokens that each query sees, itself included, >= 1; sinks inside it count once.

    Returns:
        [n, heads * d].
    """
    parts = [attention.windowed(q, k, v, window)]
    if k_sink.shape[0] and len(q) > window:
        parts.append(_sinks(attention, q_sink, k_sink, v, window))
    return joined(parts)[0].flatten(1)


def _sinks(attention: Attention, q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Attention to the sinks that are behind the window: to one in the row `window`, to one more in each next row."""
    out, norm = torch.zeros_like(q), torch.full(q.shape[:2], -torch.inf, device=q.device)
    all_seen = min(window + len(k), len(q))
    for rows, causal in ((slice(window, all_seen), True), (slice(all_seen, len(q)), False)):
        seen = min(len(k), all_seen - window)
        if len(q[rows]):
            texts = (x.unsqueeze(0) for x in (q[rows], k[:seen], v[:seen]))
            (out[rows],), (norm[rows],) = attention.normalised(*texts, causal=causal)
    return out, norm


def band_pairs(n: int, seen: int) -> int:
    """Query-key pairs of n tokens that see `seen` tokens each, sinks and window, or all there are."""
    return causal_pairs(min(n, seen)) + max(0, n - seen) * seen
