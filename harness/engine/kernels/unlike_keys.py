"""Keys unlike the mean of those that stay, while a prompt comes in by blocks (KeyDiff: Park et al., arXiv 2504.15364).

Every block's choice depends on the one before, so a KV head's rounds follow each other in one program, and only heads
run side by side. A round reads the keys that are there once: their mean direction is not computed anew, but what comes
is added and what goes is subtracted.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.linalg import vector_norm

from harness.engine.kernels.radix import ranks, search, sortable


def unlike_keys(k: Tensor, count: int, block: int, *, tile: int = 128, width: int = 4096, warps: int = 8) -> Tensor:
    """The tokens that stay of every KV head.

    The first `count` are there; then of these and the next `block` the `count` stay whose keys point away from the mean
    direction of just these, and so on. Of equal ones the earlier stays. Cosines are float32.

    Args:
        k: [n, kv_heads, d], channels of a head contiguous, n more than `count`.
        count: how many stay. block: tokens that come in at a time.
        tile: keys, width: scores that a program looks at a time. warps: of a program.

    Returns:
        [kv_heads, count] int64, ascending.
    """
    n, kv_heads, d = k.shape
    assert k.stride(2) == 1
    inverse = vector_norm(k, dim=2, dtype=torch.float32).clamp(min=1e-12).reciprocal_()
    room = count + min(block, n - count)
    tokens = torch.arange(room, device=k.device).repeat(kv_heads, 1)
    gone = torch.empty((kv_heads, room - count), dtype=torch.int64, device=k.device)
    scores = torch.empty((kv_heads, room), dtype=torch.float32, device=k.device)
    _rounds[(kv_heads,)](
        k, inverse, tokens, gone, scores, n, count, block, room, k.stride(0), k.stride(1),
        HEADS=kv_heads, DIM=d, TILE=tile, WIDTH=max(32 * warps, min(width, triton.next_power_of_2(room))),
        num_warps=warps,
    )  # fmt: skip
    return tokens[:, :count]


@triton.jit
def _directions(
    k, inverse, tokens, first, count, row_stride, HEADS: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr
) -> Any:
    """Keys of listed tokens from the `first` on, and the inverse of their lengths: [TILE, DIM] and [TILE]."""
    listed = first + tl.arange(0, TILE)
    there = listed < count
    token = tl.load(tokens + listed, mask=there, other=0)
    place = token[:, None] * row_stride + tl.arange(0, DIM)[None, :]
    key = tl.load(k + place, mask=there[:, None], other=0.0)
    return key.to(tl.float32), tl.load(inverse + token * HEADS, mask=there, other=0.0)


@triton.jit
def _sum(
    k, inverse, tokens, begin, count, row_stride, HEADS: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr
) -> Any:
    """Sum of the directions of the tokens that are listed from `begin` to `count`, [DIM]."""
    total = tl.zeros((DIM,), tl.float32)
    for first in tl.range(begin, count, TILE, num_stages=3):
        key, length = _directions(k, inverse, tokens, first, count, row_stride, HEADS, DIM, TILE)
        total += tl.sum(key * length[:, None], 0)
    return total


@triton.jit
def _rate(
    k, inverse, tokens, scores, anchor, count, row_stride, HEADS: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr
) -> Any:
    """How far each listed token's key points away from the anchor, whose length changes no order."""
    for first in tl.range(0, count, TILE, num_stages=3):
        key, length = _directions(k, inverse, tokens, first, count, row_stride, HEADS, DIM, TILE)
        score = -tl.sum(key * anchor[None, :], 1) * length
        listed = first + tl.arange(0, TILE)
        tl.store(scores + listed, score, mask=listed < count)


@triton.jit
def _part(tokens, gone, scores, there, count, WIDTH: tl.constexpr) -> Any:
    """Of so many that are there the best `count` move up, in their order, and the others are listed as gone."""
    low, span, need = search(scores, there, count, WIDTH)
    above, equal = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    for start in tl.range(0, there, WIDTH):
        listed = start + tl.arange(0, WIDTH)
        token = tl.load(tokens + listed, mask=listed < there, other=0)
        chosen, place, more_above, more_equal = ranks(sortable(scores, listed, there), low, span, need, above, equal)
        # Nobody writes where another has not read yet: places lie no further than what they are for.
        tl.debug_barrier()
        tl.store(tokens + place, token, mask=chosen)
        tl.store(gone + listed - place, token, mask=(listed < there) & (chosen == 0))
        above, equal = above + more_above, equal + more_equal


@triton.jit(do_not_specialize=["n", "count", "block", "room"])  # type: ignore[untyped-decorator]
def _rounds(
    k, inverse, tokens, gone, scores, n, count, block, room, row_stride, head_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
) -> Any:  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    k, inverse = k + head * head_stride, inverse + head
    tokens, scores, gone = tokens + head * room, scores + head * room, gone + head * (room - count)
    anchor = _sum(k, inverse, tokens, 0, count, row_stride, HEADS, DIM, TILE)
    for first in tl.range(count, n, block):
        new = tl.minimum(block, n - first)
        for start in tl.range(0, new, TILE):
            at = start + tl.arange(0, TILE)
            tl.store(tokens + count + at, (first + at).to(tl.int64), mask=at < new)
        # Between what threads store and what others read of it.
        tl.debug_barrier()
        anchor += _sum(k, inverse, tokens, count, count + new, row_stride, HEADS, DIM, TILE)
        _rate(k, inverse, tokens, scores, anchor, count + new, row_stride, HEADS, DIM, TILE)
        tl.debug_barrier()
        _part(tokens, gone, scores, count + new, count, WIDTH)
        tl.debug_barrier()
        anchor -= _sum(k, inverse, gone, 0, new, row_stride, HEADS, DIM, TILE)
