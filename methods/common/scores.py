"""How relevant prompt tokens are to the prompt's last queries: the readings that pruning methods choose from.

Only the few query rows that a score needs are recomputed, O(w * n), so the layer's own attention keeps its flash
kernel. Queries and keys are those the layer itself used: normed, projected, rotated. Grouped-query attention is scored
per query head against its group's keys.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import pad

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
    return head_attention(q, k, weights).mean(0)


def head_attention(q: Tensor, k: Tensor, weights: Tensor | None = None) -> Tensor:
    """The same for every head, [heads, n] float32, each row summing to 1."""
    attention = last_attention(q, k)
    return attention.mean(1) if weights is None else weights @ attention


def last_attention(q: Tensor, k: Tensor) -> Tensor:
    """Attention that each of the last queries pays, [heads, w, n] float32; `q` and `k` as in `token_attention`."""
    w, n = q.shape[0], k.shape[0]
    logits = head_dots(q, k).float() * _scale(q)
    if w > 1:
        future = torch.ones(w, n, dtype=torch.bool, device=q.device).triu(n - w + 1)
        logits = logits.masked_fill(future, -torch.inf)
    return logits.softmax(-1)


def window_attention(q: Tensor, k: Tensor) -> Tensor:
    """The same for every KV head, mean over the query heads that read it: [kv_heads, n] float32."""
    return head_attention(q, k).view(k.shape[1], -1, k.shape[0]).mean(1)


def attention_sums(q: Tensor, k: Tensor, before: Tensor | None = None) -> Tensor:
    """Attention that each token receives from all queries, summed; mean over the query heads of a KV head.

    Rows are taken a few at a time and each is normalised when it comes, so memory is O(n), and not O(w * n).

    Args:
        q: [w, heads, d], the queries of the last w of the n tokens; each sees the tokens up to its own.
        k: [n, kv_heads, d].
        before: [kv_heads, m] float32, what the first m tokens have received already.

    Returns:
        [kv_heads, n] float32.
    """
    past, sums = len(k) - len(q), torch.zeros((k.shape[1], len(k)), device=k.device)
    if before is not None:
        sums[:, : before.shape[1]] = before
    for begin in range(0, len(q), _ROWS):
        rows = q[begin : begin + _ROWS]
        seen = past + begin + len(rows)
        sums[:, :seen] += len(rows) * window_attention(rows, k[:seen])
    return sums


def output_norms(v: Tensor, weight: Tensor) -> Tensor:
    """L1 norm of what each value adds to the residual stream, mean over the query heads of a KV head.

    Args:
        v: [n, kv_heads, d].
        weight: of the layer's output projection, [hidden, heads * d].

    Returns:
        [kv_heads, n] float32.
    """
    n, kv_heads, d = v.shape
    heads = weight.view(len(weight), -1, d).unbind(1)
    values = v.repeat_interleave(len(heads) // kv_heads, 1).unbind(1)
    norms = [vector_norm(value @ head.T, 1, 1, dtype=torch.float32) for value, head in zip(values, heads, strict=True)]
    return torch.stack(norms).view(kv_heads, -1, n).mean(1)


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
