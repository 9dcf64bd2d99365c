"""Attention of a band: each query sees the first tokens and a window of the last ones before it.

Queries are taken in chunks, and a chunk meets only the keys that some query of it sees, so work and memory grow with
n * (sinks + window), never with n * n.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from harness.attention import Attention

CHUNK = 512


def band_attention(attention: Attention, q: Tensor, k: Tensor, v: Tensor, sinks: int, window: int) -> Tensor:
    """Token i attends to tokens j <= i with j < sinks or j > i - window.

    Args:
        attention: the kernel.
        q: [n, heads, d]. k, v: [n, kv_heads, d].
        sinks: first tokens that all see.
        window: last tokens that each sees, itself included, >= 1.

    Returns:
        [n, heads * d].
    """
    out = []
    for rows, low, high, mask in _chunks(q, sinks, window):
        keys, values = (torch.cat((x[:low], x[high : rows.stop])) for x in (k, v))
        out.append(attention.masked(q[rows], keys, values, mask))
    return torch.cat(out)


def shifted_band_attention(q: Tensor, q_sink: Tensor, k: Tensor, k_sink: Tensor, v: Tensor, window: int) -> Tensor:
    """The same band where sinks are rotated apart: `q_sink` meets `k_sink`, `q` meets the window.

    Args:
        q, q_sink: [n, heads, d], the same queries rotated for the window and for the sinks.
        k, v: [n, kv_heads, d]. k_sink: [s, kv_heads, d], the first s keys rotated for the sinks.
        window: last tokens that each query sees, itself included; sinks inside it count once.

    Returns:
        [n, heads * d].
    """
    sinks, out = k_sink.shape[0], []
    for rows, low, high, mask in _chunks(q, sinks, window):
        logits = torch.cat((_dots(q_sink[rows], k_sink[:low]), _dots(q[rows], k[high : rows.stop])), -1)
        weights = logits.float().masked_fill(~mask, -torch.inf).softmax(-1).to(v.dtype)
        values = torch.cat((v[:low], v[high : rows.stop])).repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        out.append((weights @ values.transpose(0, 1)).transpose(0, 1).flatten(1))
    return torch.cat(out)


def _chunks(q: Tensor, sinks: int, window: int) -> list[tuple[slice, int, int, Tensor]]:
    """For each chunk of queries: its rows, the keys [0, low) and [high, rows.stop) it meets, and who sees whom."""
    chunks = []
    for start in range(0, q.shape[0], CHUNK):
        stop = min(start + CHUNK, q.shape[0])
        high = max(min(sinks, stop), start - window + 1)
        low = min(sinks, high)
        rows = torch.arange(start, stop, device=q.device).unsqueeze(1)
        keys = torch.cat((torch.arange(low, device=q.device), torch.arange(high, stop, device=q.device)))
        mask = (keys <= rows) & ((keys < sinks) | (keys > rows - window))
        chunks.append((slice(start, stop), low, high, mask))
    return chunks


def _dots(q: Tensor, k: Tensor) -> Tensor:
    """Scaled logits, [n, heads, d] x [m, kv_heads, d] -> [heads, n, m]."""
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return (q.transpose(0, 1) @ keys.permute(1, 2, 0)) / math.sqrt(q.shape[-1])
