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

from harness.engine.kernels.radix import ranks, search, sortable


def unlike_keys(
    k: Tensor, lengths: Tensor, count: int, block: int, *, tile: int = 128, width: int = 4096, warps: int = 8
) -> Tensor:
    """The tokens that stay of every KV head.

    One launch, of a program for each KV head: most of the device is free for other work meanwhile.

    The first `count` are there; then of these and the next `block` the `count` stay whose keys point away from the mean
    direction of just these, and so on. Of equal ones the earlier stays. Cosines are float32.

    Args:
        k: [n, kv_heads, d], channels of a head contiguous, n more than `count`.
        lengths: [n, kv_heads] float32 contiguous, L2 norms of the keys.
        count: how many stay. block: tokens that come in at a time.
        tile: keys, width: scores that a program looks at a time. warps: of a program.

    Returns:
        [kv_heads, count] int64, ascending.
    """
    n, kv_heads, d = k.shape
    assert k.stride(2) == 1 and lengths.is_contiguous()
    room = count + min(block, n - count)
    tokens = torch.empty((kv_heads, room), dtype=torch.int64, device=k.device)
    gone = torch.empty((kv_heads, room - count), dtype=torch.int64, device=k.device)
    scores = torch.empty((kv_heads, room), dtype=torch.float32, device=k.device)
    _rounds[(kv_heads,)](
        k, lengths, tokens, gone, scores, n, count, block, room, k.stride(0), k.stride(1),
        HEADS=kv_heads, DIM=d, TILE=tile, WIDTH=max(32 * warps, min(width, triton.next_power_of_2(room))),
        num_warps=warps,
    )  # fmt: skip
    return tokens[:, :count]


@triton.jit
def _directions(
    k, lengths, tokens, first, count, row_stride, HEADS: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr
) -> Any:
    """Keys of listed tokens from the `first` on, and by how much to multiply them: [TILE, DIM] and [TILE]."""
    listed = first + tl.arange(0, TILE)
    there = listed < count
    token = tl.load(tokens + listed, mask=there, other=0)
    place = token[:, None] * row_stride + tl.arange(0, DIM)[None, :]
    key = tl.load(k + place, mask=there[:, None], other=0.0)
    length = tl.load(lengths + token * HEADS, mask=there, other=float("inf"))
    return key.to(tl.float32), 1.0 / tl.maximum(length, 1.0e-12)


@triton.jit
def _sum(
    k, lengths, tokens, begin, count, row_stride, HEADS: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr
) -> Any:
    """Sum of the directions of the tokens that are listed from `begin` to `count`, [DIM]."""
    total = tl.zeros((DIM,), tl.float32)
    for first in tl.range(begin, count, TILE, num_stages=3):
        key, unit = _directions(k, lengths, tokens, first, count, row_stride, HEADS, DIM, TILE)
        total += tl.sum(key * unit[:, None], 0)
    return total


@triton.jit
def _rate(
    k, lengths, tokens, scores, anchor, count, row_stride, HEADS: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr
) -> Any:
    """How far each listed token's key points away from the anchor, whose length changes no order."""
    for first in tl.range(0, count, TILE, num_stages=3):
        key, unit = _directions(k, lengths, tokens, first, count, row_stride, HEADS, DIM, TILE)
        score = -tl.sum(key * anchor[None, :], 1) * unit
        listed = first + tl.arange(0, TILE)
        tl.store(scores + listed, score, mask=listed < count)


@triton.jit
def _list(tokens, first, count, TILE: tl.constexpr) -> Any:
    """Lists so many tokens from the `first` on; then all threads see them."""
    for start in tl.range(0, count, TILE):
        at = start + tl.arange(0, TILE)
        tl.store(tokens + at, (first + at).to(tl.int64), mask=at < count)
    tl.debug_barrier()


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
    k, lengths, tokens, gone, scores, n, count, block, room, row_stride, head_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
) -> Any:  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    k, lengths = k + head * head_stride, lengths + head
    tokens, scores, gone = tokens + head * room, scores + head * room, gone + head * (room - count)
    _list(tokens, 0, count, TILE)
    anchor = _sum(k, lengths, tokens, 0, count, row_stride, HEADS, DIM, TILE)
    for first in tl.range(count, n, block):
        new = tl.minimum(block, n - first)
        _list(tokens + count, first, new, TILE)
        anchor += _sum(k, lengths, tokens, count, count + new, row_stride, HEADS, DIM, TILE)
        _rate(k, lengths, tokens, scores, anchor, count + new, row_stride, HEADS, DIM, TILE)
        tl.debug_barrier()
        _part(tokens, gone, scores, count + new, count, WIDTH)
        tl.debug_barrier()
        anchor -= _sum(k, lengths, gone, 0, new, row_stride, HEADS, DIM, TILE)
