"""Attention of a band: each token sees the first ones, the sinks, and a window of the last ones.

With a kernel that knows windows these are two calls, joined by their normalisers. One that knows causal attention only,
but takes views (`Attention.takes_views`), is called over overlapping views of the keys: the rows are cut into blocks,
and with each go the keys of the window of its last row. That is causal attention of fewer queries than keys, one call
for all blocks; windows overlap, so their keys and values are views and no copies. What a row lacks is the far edge of
its own window, fewer keys than a block has rows, and the sinks: one more kernel, `harness.engine.kernels.band_edges`,
adds both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.engine.attention import Attention, joined

ROWS = 128
"""Rows a block: as many as FlashAttention 3 has in a tile."""


def banded(attention: Attention, q: Tensor, q_sink: Tensor, k: Tensor, v: Tensor, sinks: int, window: int) -> Tensor:
    """Token i attends to tokens j <= i with j < sinks or j > i - window.

    Work and memory grow with n * (sinks + window), never with n * n.

    Args:
        attention: the kernel.
        q, q_sink: [n, heads, d], the same queries rotated for the window and for the sinks that lie before it.
        k, v: [n, kv_heads, d]. Tokens may lie apart, heads and channels may not.
        sinks: first tokens that each query sees.
        window: last tokens that each query sees, itself included, >= 1; sinks inside it count once.

    Returns:
        [n, heads * d].
    """
    if attention.takes_views and window >= ROWS and not q.shape[2] & (q.shape[2] - 1):
        return _overlapping(attention, q, q_sink, k, v, sinks, window)
    parts = [attention.windowed(q, k, v, window)]
    if sinks and len(q) > window:
        parts.append(_sinks(attention, q_sink, k[:sinks], v, window))
    return joined(parts)[0].flatten(1)


def _sinks(attention: Attention, q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Attention to the sinks behind the window: to one in the row `window`, to one more in each next row."""
    out, norm = torch.zeros_like(q), torch.full(q.shape[:2], -torch.inf, device=q.device)
    all_seen = min(window + len(k), len(q))
    for rows, causal in ((slice(window, all_seen), True), (slice(all_seen, len(q)), False)):
        seen = min(len(k), all_seen - window)
        if len(q[rows]):
            texts = (x.unsqueeze(0) for x in (q[rows], k[:seen], v[:seen]))
            (out[rows],), (norm[rows],) = attention.normalised(*texts, causal=causal)
    return out, norm


def _overlapping(
    attention: Attention, q: Tensor, q_sink: Tensor, k: Tensor, v: Tensor, sinks: int, window: int
) -> Tensor:
    n, heads, dim = q.shape
    blocks = -(-(n - window) // ROWS)
    if blocks <= 0:
        return attention.normalised(*(x.unsqueeze(0) for x in (q, k, v)))[0][0].flatten(1)
    from harness.engine.kernels.band_edges import join_edges

    first = n - blocks * ROWS
    out = q.new_empty((n, heads * dim))
    out[:first] = attention.normalised(*(x[:first].unsqueeze(0) for x in (q, k, v)))[0][0].flatten(1)
    last = (_windows(x[first + ROWS - window :], blocks, window) for x in (k, v))
    done, norms = attention.normalised(q[first:].view(blocks, ROWS, heads, dim), *last)
    join_edges(done, norms, q, q_sink, k, v, sinks, window, out[first:])
    return out


def _windows(x: Tensor, blocks: int, window: int) -> Tensor:
    """[n, kv_heads, d] -> [blocks, window, kv_heads, d], each `ROWS` further on; a view."""
    return x.as_strided((blocks, window, *x.shape[1:]), (ROWS * x.stride(0), *x.stride()), x.storage_offset())
