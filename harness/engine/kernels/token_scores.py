"""How much attention one token pays to each of others: LazyLLM's score (Fu et al., arXiv 2407.14057, eq. 1).

One pass over the keys is enough, since the attention before it left what its softmax was divided by.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from harness.engine.kernels.online_softmax import ROWS

_BLOCK = 64


def token_scores(
    q: Tensor, norms: Tensor, kv_heads: int, tokens: Tensor, count: Tensor, table: Tensor, layer: int, scores: Tensor
) -> Tensor:
    """Attention that the listed tokens receive from one query: mean over heads of softmax(q k / sqrt(d)).

    Args:
        q: the token's queries, [heads, d], rotated, heads contiguous.
        norms: [heads] float32, see `DecodeAttention.norms`, of attention to just these tokens.
        kv_heads: heads of the keys.
        tokens: [2, room] int32 contiguous, whose first row has the slots of tokens in the layer's cache.
        count: [1] int64, how many of them count.
        table: [layers, 3] int64 contiguous, see `DecodeAttention`. layer: row of it.
        scores: [room] float32, filled as far as tokens count.

    Returns:
        `scores`.
    """
    heads, dim = q.shape
    assert q.stride() == (dim, 1) and norms.is_contiguous()
    _score[(triton.cdiv(tokens.shape[1], _BLOCK),)](
        q, norms, tokens, count, table, scores, layer,
        HEADS=heads, KV_HEADS=kv_heads, DIM=dim, SCALE=dim**-0.5 * math.log2(math.e), BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    return scores


@triton.jit(do_not_specialize=["layer"])  # type: ignore[untyped-decorator]
def _score(
    q, norms, tokens, count, table, scores, layer,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr,
) -> Any:  # fmt: skip
    """The scores of a block of tokens."""
    listed = tl.load(count).to(tl.int32)
    first = tl.program_id(0) * BLOCK
    if first >= listed:
        return
    GROUP: tl.constexpr = HEADS // KV_HEADS
    row, at, token = tl.arange(0, ROWS), tl.arange(0, DIM), first + tl.arange(0, BLOCK)
    mine, inside = row < GROUP, token < listed
    keys = tl.multiple_of(tl.load(table + layer * 3).to(tl.pointer_type(q.dtype.element_ty)), 16)
    offset = tl.load(tokens + token, mask=inside, other=0).to(tl.int64) * (KV_HEADS * DIM)
    score = tl.zeros((BLOCK,), tl.float32)
    for kv_head in tl.range(0, KV_HEADS, num_stages=3):
        head = kv_head * GROUP + row
        query = tl.load(q + head[:, None] * DIM + at[None, :], mask=mine[:, None], other=0.0)
        key = tl.load(keys + kv_head * DIM + offset[None, :] + at[:, None], mask=inside[None, :], other=0.0)
        norm = tl.load(norms + head, mask=mine, other=float("inf"))
        logit = tl.dot(query, key, input_precision="ieee") * SCALE
        score += tl.sum(tl.exp2(logit - norm[:, None]), 0)
    tl.store(scores + token, score / HEADS, mask=inside)
