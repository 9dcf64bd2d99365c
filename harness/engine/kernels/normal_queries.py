"""Queries as a normal distribution: their moments at positions to come, and the logits that such queries would give.

Both are matrix products of half precision with float32 sums (Expected Attention, Devoto et al., arXiv 2510.00636). The
first reads the queries once and turns them back on the way; the second reads the keys once for all their query heads.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows that one program takes for a head.
_SHARE = 4096
# Pairs of channels, rows of the covariance, that one program turns ahead.
_CHANNELS = 8


def moments(
    q: Tensor, turns: Tensor, ahead: Tensor, *, rows: int = 32, warps: int = 4, stages: int = 3
) -> tuple[Tensor, Tensor]:
    """Mean and covariance of queries that are turned back first, turned ahead.

    Args:
        q: [n, heads, d], channels of a head contiguous.
        turns: [n, d] contiguous, cosines and then sines of the angles; halves of a head are paired.
        ahead: [d] float32, what all are multiplied by that was turned back, likewise.
        rows: of a tile. warps, stages: of a program.

    Returns:
        [heads, d] and [heads, d, d] float32.
    """
    n, heads, d = q.shape
    assert q.stride(2) == 1 and turns.is_contiguous()
    shares = triton.cdiv(n, _SHARE)
    sums = torch.empty((shares, heads, d), dtype=torch.float32, device=q.device)
    squares = torch.empty((shares, heads, d, d), dtype=torch.float32, device=q.device)
    _moments[heads, shares](
        q, turns, sums, squares, n, q.stride(0), q.stride(1),
        HALF=d // 2, SHARE=_SHARE, ROWS=rows, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    mean, covariance = torch.empty_like(sums[0]), torch.empty_like(squares[0])
    _turn_ahead[heads, triton.cdiv(d // 2, _CHANNELS)](
        sums, squares, ahead, mean, covariance, n, shares, HALF=d // 2, CHANNELS=_CHANNELS, num_warps=4
    )
    return mean, covariance


def normal_logits(
    k: Tensor, mean: Tensor, covariance: Tensor, *, tokens: int = 128, warps: int = 8, stages: int = 2
) -> Tensor:
    """mean k / sqrt(d) + k covariance k / (2 d).

    Args:
        k: [n, kv_heads, d], channels of a head contiguous.
        mean: [heads, d] float32 contiguous.
        covariance: [heads, d, d] contiguous, of the dtype of k.
        tokens: of a program. warps, stages: of it.

    Returns:
        [kv_heads, heads / kv_heads, n] float32.
    """
    (n, kv_heads, d), heads = k.shape, len(mean)
    assert k.stride(2) == 1 and mean.is_contiguous() and covariance.is_contiguous()
    logits = torch.empty((kv_heads, heads // kv_heads, n), dtype=torch.float32, device=k.device)
    _logits[kv_heads, triton.cdiv(n, tokens)](
        k, mean, covariance, logits, n, k.stride(0), k.stride(1),
        GROUP=heads // kv_heads, DIM=d, TOKENS=tokens, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return logits


@triton.jit(do_not_specialize=["n"])  # type: ignore[untyped-decorator]
def _moments(
    q, turns, sums, squares, n, row_stride, head_stride, HALF: tl.constexpr, SHARE: tl.constexpr, ROWS: tl.constexpr
) -> Any:
    """A share of the rows of one head, each as two halves: their sums and the products of all channels."""
    head, share, at = tl.program_id(0), tl.program_id(1), tl.arange(0, HALF)
    first_sum, second_sum = tl.zeros((ROWS, HALF), tl.float32), tl.zeros((ROWS, HALF), tl.float32)
    upper, middle = tl.zeros((HALF, HALF), tl.float32), tl.zeros((HALF, HALF), tl.float32)
    lower = tl.zeros((HALF, HALF), tl.float32)
    for begin in tl.range(share * SHARE, tl.minimum((share + 1) * SHARE, n), ROWS):
        row = (begin + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        place, angle, there = row * row_stride + head * head_stride + at[None, :], row * 2 * HALF + at[None, :], row < n
        a, b = tl.load(q + place, mask=there, other=0.0), tl.load(q + place + HALF, mask=there, other=0.0)
        cos = tl.load(turns + angle, mask=there, other=0.0).to(tl.float32)
        sin = tl.load(turns + angle + HALF, mask=there, other=0.0).to(tl.float32)
        first = (a * cos - b * sin).to(q.dtype.element_ty)
        second = (b * cos + a * sin).to(q.dtype.element_ty)
        first_sum += first.to(tl.float32)
        second_sum += second.to(tl.float32)
        upper = tl.dot(tl.trans(first), first, upper, input_precision="ieee")
        middle = tl.dot(tl.trans(first), second, middle, input_precision="ieee")
        lower = tl.dot(tl.trans(second), second, lower, input_precision="ieee")
    this = (share * tl.num_programs(0) + head).to(tl.int64) * 2 * HALF
    tl.store(sums + this + at, tl.sum(first_sum, 0))
    tl.store(sums + this + HALF + at, tl.sum(second_sum, 0))
    cell = squares + this * 2 * HALF + at[:, None] * 2 * HALF + at[None, :]
    tl.store(cell, upper)
    tl.store(cell + HALF, middle)
    tl.store(cell + 2 * HALF * HALF, tl.trans(middle))
    tl.store(cell + 2 * HALF * HALF + HALF, lower)


@triton.jit
def _mean(sums, channel, n, shares, apart) -> Any:
    """Of some channels, over all shares."""
    total = tl.zeros(channel.shape, tl.float32)
    for share in range(shares):
        total += tl.load(sums + share * apart + channel)
    return total / n


@triton.jit
def _turned(first, second, cos, sin) -> Any:
    return first * cos - second * sin, second * cos + first * sin


@triton.jit(do_not_specialize=["n", "shares"])  # type: ignore[untyped-decorator]
def _turn_ahead(
    sums, squares, ahead, mean, covariance, n, shares, HALF: tl.constexpr, CHANNELS: tl.constexpr
) -> Any:  # fmt: skip
    """Some rows of the covariance of one head and those that they are paired with: joins shares, turns both sides."""
    head, heads, at = tl.program_id(0), tl.num_programs(0), tl.arange(0, HALF)
    row = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    sums += head * 2 * HALF
    a, b = _mean(sums, at, n, shares, heads * 2 * HALF), _mean(sums + HALF, at, n, shares, heads * 2 * HALF)
    own_a, own_b = _mean(sums, row, n, shares, heads * 2 * HALF), _mean(sums + HALF, row, n, shares, heads * 2 * HALF)
    cos, sin = tl.load(ahead + at), tl.load(ahead + HALF + at)
    own_cos, own_sin = tl.load(ahead + row)[:, None], tl.load(ahead + HALF + row)[:, None]
    cell = row[:, None] * 2 * HALF + at[None, :] + head * 4 * HALF * HALF
    zero = tl.zeros((CHANNELS, HALF), tl.float32)
    upper, middle, under, lower = zero, zero, zero, zero
    for share in range(shares):
        here = squares + share * heads * 4 * HALF * HALF + cell
        upper += tl.load(here)
        middle += tl.load(here + HALF)
        under += tl.load(here + 2 * HALF * HALF)
        lower += tl.load(here + 2 * HALF * HALF + HALF)
    upper, middle = upper / n - own_a[:, None] * a[None, :], middle / n - own_a[:, None] * b[None, :]
    under, lower = under / n - own_b[:, None] * a[None, :], lower / n - own_b[:, None] * b[None, :]
    upper, middle = _turned(upper, middle, cos[None, :], sin[None, :])
    under, lower = _turned(under, lower, cos[None, :], sin[None, :])
    upper, under = _turned(upper, under, own_cos, own_sin)
    middle, lower = _turned(middle, lower, own_cos, own_sin)
    tl.store(covariance + cell, upper)
    tl.store(covariance + cell + HALF, middle)
    tl.store(covariance + cell + 2 * HALF * HALF, under)
    tl.store(covariance + cell + 2 * HALF * HALF + HALF, lower)
    if tl.program_id(1) == 0:
        first, second = _turned(a, b, cos, sin)
        tl.store(mean + head * 2 * HALF + at, first)
        tl.store(mean + head * 2 * HALF + HALF + at, second)


@triton.jit(do_not_specialize=["n"])  # type: ignore[untyped-decorator]
def _logits(
    k, mean, covariance, logits, n, row_stride, head_stride,
    GROUP: tl.constexpr, DIM: tl.constexpr, TOKENS: tl.constexpr,
) -> Any:  # fmt: skip
    """A block of tokens of one KV head for all its query heads."""
    kv_head, token, at = tl.program_id(0), tl.program_id(1) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, DIM)
    place = token.to(tl.int64)[:, None] * row_stride + kv_head * head_stride + at[None, :]
    key = tl.load(k + place, mask=(token < n)[:, None], other=0.0)
    for head in tl.range(kv_head * GROUP, (kv_head + 1) * GROUP):
        spread = tl.load(covariance + head * DIM * DIM + at[:, None] * DIM + at[None, :])
        slope = tl.load(mean + head * DIM + at)[None, :] * (DIM**-0.5)
        curve = tl.dot(key, spread, input_precision="ieee") * (0.5 / DIM)
        tl.store(logits + head * n + token, tl.sum((curve + slope) * key, 1), mask=token < n)
