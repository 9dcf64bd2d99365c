"""How much attention tokens get from the query that wants them most: the score `query_peak` of SlimInfer's blocks.

One pass sums what attention is divided by (`harness.engine.kernels.column_sums.share_norms`). In the next a program
owns a few units of tokens and walks over all heads and queries: no attention is stored, and sums have one order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from harness.engine.kernels.column_sums import LOG2_E, share_norms

# Tokens a program has, about; of few tokens fewer, so that a short prompt's are spread over the whole device.
_TOKENS, _FEW_TOKENS, _FEW = 64, 16, 8192
# Queries of a head that are multiplied at a time, and those of all heads of a KV head, at most.
_QUERIES, _ROWS = 32, 256
# Shares that the tokens are cut into for the first pass, at most, and tokens a share is a multiple of.
_SHARES, _STEP = 8, 128


def query_peaks(q: Tensor, k: Tensor, unit: int, raters: Tensor | None = None) -> Tensor:
    """Sums over runs of tokens of the greatest attention from one of the last queries, mean over heads.

    Args:
        q: [w, heads, d], the queries of the last w of the n tokens; each sees the tokens up to its own. Channels of a
            head are contiguous.
        k: [n, kv_heads, d], likewise.
        unit: tokens a run; the last one may be shorter.
        raters: which queries count, [w] bool; None for all.

    Returns:
        [ceil(n / unit)] float32, over the number of queries that count.
    """
    (w, heads, d), (n, kv_heads, _) = q.shape, k.shape
    assert q.stride(2) == k.stride(2) == 1, "channels of a head must be contiguous"
    norms = share_norms(q, k, triton.cdiv(triton.cdiv(n, _SHARES), _STEP) * _STEP)
    width = triton.next_power_of_2(unit)
    units = max(1, (_FEW_TOKENS if n <= _FEW else _TOKENS) // width)
    group = heads // kv_heads
    wide = triton.next_power_of_2(group)
    queries = max(16, min(_QUERIES, triton.next_power_of_2(w), _ROWS // wide))
    sums = torch.empty(triton.cdiv(n, unit), dtype=torch.float32, device=k.device)
    _peaks[(triton.cdiv(len(sums), units),)](
        q, k, norms, raters, sums, w, n, len(norms), q.stride(0), q.stride(1), k.stride(0), k.stride(1),
        SCALE=d**-0.5 * LOG2_E.value, HEADS=heads, GROUP=group, WIDE=wide, DIM=d, UNIT=unit, WIDTH=width,
        UNITS=units, QUERIES=queries, SHARES=_SHARES, num_warps=8, num_stages=1,
    )  # fmt: skip
    return sums


@triton.jit
def _norm(norms, place, mine, apart, shares, SHARES: tl.constexpr) -> Any:
    """Joined over the shares, base 2; infinite for queries that are not `mine`."""
    share = tl.arange(0, SHARES)
    there = (share < shares)[:, None] & mine[None, :]
    each = tl.load(norms + share[:, None] * apart + place[None, :], mask=there, other=-1.0e30) * LOG2_E
    top = tl.max(each, 0)
    return tl.where(mine, top + tl.log2(tl.sum(tl.exp2(each - top[None, :]), 0)), float("inf"))


@triton.jit(do_not_specialize=["count", "n", "shares"])  # type: ignore[untyped-decorator]
def _peaks(
    q, k, norms, raters, sums, count, n, shares, q_stride, q_head, k_stride, k_head,
    SCALE: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr, DIM: tl.constexpr,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, UNITS: tl.constexpr, QUERIES: tl.constexpr, SHARES: tl.constexpr,
) -> Any:  # fmt: skip
    """Some units. The query heads of a KV head are multiplied together, a head's queries beside each other."""
    each, at, flat = tl.arange(0, UNITS * WIDTH), tl.arange(0, DIM), tl.arange(0, WIDE * QUERIES)
    token = (tl.program_id(0) * UNITS + each // WIDTH) * UNIT + each % WIDTH
    there = (each % WIDTH < UNIT) & (token < n)
    past, rating = n - count, tl.full((), 0, tl.int32)
    if raters is None:
        rating += count
    else:
        for first in tl.range(0, count, QUERIES):
            row = first + tl.arange(0, QUERIES)
            rating += tl.sum(tl.load(raters + row, mask=row < count, other=0).to(tl.int32), 0)
    total = tl.zeros((UNITS * WIDTH,), tl.float32)
    for kv_head in tl.range(0, HEADS // GROUP):
        place = token.to(tl.int64)[None, :] * k_stride + kv_head * k_head + at[:, None]
        key = tl.load(k + place, mask=there[None, :], other=0.0)
        head = kv_head * GROUP + flat // QUERIES
        peak = tl.zeros((WIDE, UNITS * WIDTH), tl.float32)
        for first in tl.range(0, count, QUERIES):
            row = first + flat % QUERIES
            mine = (row < count) & (flat // QUERIES < GROUP)
            if raters is not None:
                mine = mine & (tl.load(raters + row, mask=mine, other=0) != 0)
            query = tl.load(q + (row * q_stride + head * q_head)[:, None] + at[None, :], mask=mine[:, None], other=0.0)
            norm = _norm(norms, row * HEADS + head, mine, count * HEADS, shares, SHARES)
            paid = tl.exp2(tl.dot(query, key, input_precision="ieee") * SCALE - norm[:, None])
            paid = tl.where(token[None, :] <= past + row[:, None], paid, 0.0)
            peak = tl.maximum(peak, tl.max(tl.reshape(paid, (WIDE, QUERIES, UNITS * WIDTH)), 1))
        total += tl.sum(peak, 0)
    total = tl.reshape(tl.where(there, total, 0.0), (UNITS, WIDTH))
    run = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    tl.store(sums + run, tl.sum(total, 1) / (HEADS * rating), mask=run * UNIT < n)
