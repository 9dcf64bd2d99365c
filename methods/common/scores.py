"""How relevant prompt tokens are to the prompt's last queries: the readings that pruning methods choose from.

Only the few query rows that a score needs are recomputed, O(w * n), so the layer's own attention keeps its flash
kernel. Queries and keys are those the layer itself used: normed, projected, rotated. Grouped-query attention is scored
per query head against its group's keys.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad


def token_attention(q: Tensor, k: Tensor) -> Tensor:
    """Attention that each token receives from the last queries: mean over heads and queries of softmax(q k / sqrt(d)).

    With one query this is LazyLLM's score (arXiv 2407.14057, eq. 1).

    Args:
        q: [w, heads, d], the queries of the last w of the n tokens; each sees the tokens up to its own.
        k: [n, kv_heads, d].

    Returns:
        [n] float32, summing to 1.
    """
    return head_attention(q, k).mean(0)


def head_attention(q: Tensor, k: Tensor) -> Tensor:
    """The same for every head, [heads, n] float32, each row summing to 1."""
    w, n = q.shape[0], k.shape[0]
    logits = head_dots(q, k).float() * _scale(q)
    if w > 1:
        future = torch.ones(w, n, dtype=torch.bool, device=q.device).triu(n - w + 1)
        logits = logits.masked_fill(future, -torch.inf)
    return logits.softmax(-1).mean(1)


def window_attention(q: Tensor, k: Tensor) -> Tensor:
    """The same for every KV head, mean over the query heads that read it: [kv_heads, n] float32."""
    return head_attention(q, k).view(k.shape[1], -1, k.shape[0]).mean(1)


def unit_attention(q: Tensor, k: Tensor, unit: int) -> Tensor:
    """Softmax over units of the mean query against mean keys, mean over heads.

    Args:
        q: [w, heads, d]. k: [n, kv_heads, d]. unit: tokens a unit.

    Returns:
        [ceil(n / unit)] float32, summing to 1.
    """
    return unit_attention_from_means(q, unit_means(k, unit))


def unit_attention_from_means(q: Tensor, units: Tensor, lift: Tensor | float = 0.0) -> Tensor:
    """The same from the units' mean keys, [units, kv_heads, d], with `lift`, [units], added to their logits."""
    logits = head_dots(q.mean(0, keepdim=True), units).float() * _scale(q) + lift
    return logits.softmax(-1).mean((0, 1))


def unit_absdot(q: Tensor, k: Tensor, unit: int) -> Tensor:
    """Mean over heads of |mean query . mean key|, the literal reading of SlimInfer's text.

    Args:
        q: [w, heads, d]. k: [n, kv_heads, d]. unit: tokens a unit.

    Returns:
        [ceil(n / unit)] float32.
    """
    return head_dots(q.mean(0, keepdim=True), unit_means(k, unit)).float().abs().mean((0, 1))


def _scale(q: Tensor) -> float:
    return 1.0 / math.sqrt(q.shape[-1])


def head_dots(q: Tensor, k: Tensor) -> Tensor:
    """q . k for every query head against its group's keys: [w, heads, d] x [n, kv_heads, d] -> [heads, w, n]."""
    w, heads, d = q.shape
    group = heads // k.shape[1]
    queries = q.transpose(0, 1).reshape(k.shape[1], group * w, d)
    return (queries @ k.permute(1, 2, 0)).view(heads, w, k.shape[0])


def unit_means(x: Tensor, unit: int) -> Tensor:
    """Mean over runs of `unit` tokens, the last run possibly shorter: [n, ...] -> [ceil(n / unit), ...]."""
    sums = unit_sums(x, unit)
    sums[:-1] /= unit
    sums[-1] /= x.shape[0] - (sums.shape[0] - 1) * unit
    return sums


def unit_sums(x: Tensor, unit: int) -> Tensor:
    """Sum over runs of `unit` tokens, the last run possibly shorter: [n, ...] -> [ceil(n / unit), ...]."""
    padded = pad(x, (0, 0) * (x.dim() - 1) + (0, -x.shape[0] % unit))
    return padded.reshape(-1, unit, *x.shape[1:]).sum(1)


def block_maxima(units: Tensor, per_block: int) -> Tensor:
    """Best unit of each block: [units] -> [ceil(units / per_block)]."""
    padded = pad(units, (0, -units.shape[0] % per_block), value=-torch.inf)
    return padded.reshape(-1, per_block).amax(1)
