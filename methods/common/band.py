"""Attention of a band: each query sees the first tokens and a window of the last ones before it.

Cut the text into blocks as long as the window. A query sees its own block up to itself, which is causal attention, and
of the block before it what is less than a window away, which is causal attention read backwards. Both go through the
kernel that full attention uses, and are joined by their normalisers with the few sinks, as flash-decoding joins its
shares (Dao et al., 2023). So work and memory grow with n * (sinks + window), never with n * n.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from harness.engine.attention import Attention, repeated_heads


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
    n = q.shape[0]
    parts = [_own_block(attention, *(_blocks(x, window) for x in (q, k, v)))]
    if n > window > 1:
        parts.append(_block_before(attention, *(_blocks(x, window) for x in (q, k, v))))
    if k_sink.shape[0] and n > window:
        parts.append(_sinks(q_sink, k_sink, v[: len(k_sink)], window))
    return _joined([(out[:n], norm[:n]) for out, norm in parts]).to(q.dtype).flatten(1)


def _blocks(x: Tensor, window: int) -> Tensor:
    """[n, h, d] -> [blocks, window, h, d]; what the last block lacks is behind every query that counts."""
    missing = -x.shape[0] % window
    return torch.nn.functional.pad(x, (0, 0, 0, 0, 0, missing)).view(-1, window, *x.shape[1:])


def _own_block(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, norm = attention.normalised(q, k, v)
    return out.flatten(0, 1), norm.flatten(0, 1)


def _block_before(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Query r of a block sees key c of the one before it where c > r; from the end, that is c' <= r' - 1."""
    out = torch.zeros_like(q)
    norm = torch.full(q.shape[:3], -torch.inf, device=q.device)
    found, weight = attention.normalised(q[1:, :-1].flip(1), k[:-1, 1:].flip(1), v[:-1, 1:].flip(1))
    out[1:, :-1], norm[1:, :-1] = found.flip(1), weight.flip(1)
    return out.flatten(0, 1), norm.flatten(0, 1)


def _sinks(q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Attention to the sinks that are behind the window."""
    keys, values = repeated_heads(k, q.shape[1]), repeated_heads(v, q.shape[1])
    logits = torch.einsum("nhd,shd->nhs", q, keys).float() / math.sqrt(q.shape[2])
    place = torch.arange(q.shape[0], device=q.device) - window
    behind = torch.arange(len(k), device=q.device) <= place.unsqueeze(1)
    norm = logits.masked_fill_(~behind.unsqueeze(1), -torch.inf).logsumexp(-1)
    weights = (logits - norm.clamp(min=torch.finfo(norm.dtype).min).unsqueeze(-1)).exp_().to(v.dtype)
    return torch.einsum("nhs,shd->nhd", weights, values), norm


def _joined(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """One softmax over all parts: results [n, heads, d] and their normalisers, [n, heads] log-sum-exp -> float32."""
    shares = torch.stack([norm for _, norm in parts]).softmax(0).unsqueeze(-1)
    whole = parts[0][0] * shares[0]
    for (out, _), share in zip(parts[1:], shares[1:], strict=True):
        whole.addcmul_(out, share)
    return whole
