"""How relevant prompt tokens are to the prompt's last queries: the readings that pruning methods choose from.

Only the few query rows that a score needs are recomputed, O(w * n), so the layer's own attention keeps its flash
kernel. Queries and keys are those the layer itself used: normed, projected, rotated. Grouped-query attention is scored
per query head against its group's keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import avg_pool1d, max_pool1d

from harness.engine.hardware import kernels_take

_ROWS = 64
"""Query rows whose attention to all tokens is there at a time."""


def token_attention(q: Tensor, k: Tensor, weights: Tensor | None = None) -> Tensor:
    """Attention that each token receives from the last queries: mean over heads and queries of softmax(q k / sqrt(d)).

    With one query this is LazyLLM's score (arXiv 2407.14057, eq. 1).

    Args:
        q: [w, heads, d], the queries of the last w of the n tokens; each sees the tokens up to its own.
        k: [n, kv_heads, d].
        weights: how much each query counts, [w] float32, summing to 1; None for all the same.

    Returns:
        [n] float32, summing to 1.
    """
    if len(q) == 1 and kernels_take(k):
        from harness.engine.kernels.query_peaks import query_peaks

        return query_peaks(q, k, unit=1)
    return head_attention(q, k, weights).mean(0)


def head_attention(q: Tensor, k: Tensor, weights: Tensor | None = None) -> Tensor:
    """The same for every head, [heads, n] float32, each row summing to 1."""
    attention = last_attention(q, k)
    return attention.mean(1) if weights is None else weights @ attention


def last_attention(q: Tensor, k: Tensor) -> Tensor:
    """Attention that each of the last queries pays, [heads, w, n] float32; `q` and `k` as in `token_attention`."""
    return causal_logits(q, k).softmax(-1)


def causal_logits(q: Tensor, k: Tensor) -> Tensor:
    """q k / sqrt(d), [heads, w, n] float32, and minus infinity where a query does not see the token."""
    w, n = q.shape[0], k.shape[0]
    if w == 1:
        return head_logits(q, k)
    future = torch.full((w, n), -torch.inf, device=q.device).triu(n - w + 1)
    return torch.add(future, head_dots(q, k), alpha=1.0 / math.sqrt(q.shape[-1]))


def window_attention(q: Tensor, k: Tensor) -> Tensor:
    """The same for every KV head, mean over the query heads that read it: [kv_heads, n] float32."""
    return attention_sums(q, k, share=1 / len(q))


def attention_sums(q: Tensor, k: Tensor, norms: Tensor | None = None, *, share: float = 1.0) -> Tensor:
    """Attention that each token receives from all queries, summed; mean over the query heads of a KV head.

    Memory is O(n), and not O(w * n): a kernel keeps no weights, and without it rows are taken a few at a time.

    Args:
        q: [w, heads, d], the queries of the last w of the n tokens; each sees the tokens up to its own.
        k: [n, kv_heads, d].
        norms: log of each softmax's denominator, [w, heads] float32, if attention has left it; saves a pass over k.
        share: what each query counts.

    Returns:
        [kv_heads, n] float32.
    """
    group = q.shape[1] // k.shape[1]
    if kernels_take(k):
        from harness.engine.kernels import column_sums

        norms = column_sums.row_norms(q, k) if norms is None else norms
        return column_sums.attention_sums(q, k, norms, factor=share / group)
    past, sums = len(k) - len(q), torch.zeros((k.shape[1], len(k)), device=k.device)
    for begin in range(0, len(q), _ROWS):
        rows = slice(begin, begin + _ROWS)
        logits = causal_logits(q[rows], k[: past + begin + _ROWS])
        divisors = logits.logsumexp(-1) if norms is None else norms[rows].T
        weights = (logits - divisors.unsqueeze(-1)).exp().sum(1)
        sums[:, : weights.shape[1]] += weights.view(k.shape[1], group, -1).mean(1)
    return sums.mul_(share)


def pooled(scores: Tensor, kernel: int, pool: Literal["avg", "max"]) -> Tensor:
    """Mean or maximum over `kernel` tokens around each one, as the methods around SnapKV (arXiv 2404.14469) do it.

    Args:
        scores: [heads, n] float32.
        kernel: odd. The mean counts zeros beyond both ends, so it damps the first and the last tokens, as the authors'
            code does.
        pool: which.

    Returns:
        [heads, n].
    """
    smooth = avg_pool1d if pool == "avg" else max_pool1d
    return smooth(scores.unsqueeze(1), kernel, stride=1, padding=kernel // 2).squeeze(1)


def head_norms(x: Tensor) -> Tensor:
    """L2 norms of keys or values, [n, heads, d] -> [n, heads] float32."""
    if kernels_take(x):
        from harness.engine.kernels import rowwise

        return rowwise.head_norms(x)
    norms: Tensor = vector_norm(x, dim=2, dtype=torch.float32)
    return norms


def output_norms(v: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """L1 norm of what each value adds to the residual stream, mean over the query heads of a KV head.

    This takes as many operations as the output projection itself: 2 n * hidden * heads * d.

    Args:
        v: [n, layers * kv_heads, d].
        weights: of the layers' output projections, [hidden, heads * d].

    Returns:
        [layers * kv_heads, n] float32.
    """
    n, kv_heads, d = v.shape
    parts = [weight.view(len(weight), -1, d) for weight in weights]
    group = len(parts) * parts[0].shape[1] // kv_heads
    if kernels_take(v):
        from harness.engine.kernels.column_sums import absolute_sums

        return absolute_sums(parts, v) / group
    values = v.repeat_interleave(group, 1).unbind(1)
    each = zip(values, (part for layer in parts for part in layer.unbind(1)), strict=True)
    norms = [vector_norm(value @ part.T, 1, 1, dtype=torch.float32) for value, part in each]
    return torch.stack(norms).view(kv_heads, -1, n).mean(1)


def head_dots(q: Tensor, k: Tensor) -> Tensor:
    """q . k for every query head against its group's keys: [w, heads, d] x [n, kv_heads, d] -> [heads, w, n]."""
    w, heads, d = q.shape
    group = heads // k.shape[1]
    queries = q.transpose(0, 1).reshape(k.shape[1], group * w, d)
    return (queries @ k.permute(1, 2, 0)).view(heads, w, k.shape[0])


def head_logits(q: Tensor, k: Tensor) -> Tensor:
    """The same in float32, over sqrt(d)."""
    return head_dots(q, k).float() * (1.0 / math.sqrt(q.shape[-1]))
