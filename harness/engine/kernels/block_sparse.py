"""Exact causal attention of every query head to key blocks, and single keys, that each block of rows has chosen.

A kernel of its own, and not PyTorch's `flex_attention`: its lists name whole blocks on a fixed grid, while MInference's
blocks begin anywhere and come with single keys (Jiang et al., arXiv 2407.02490), and it is compiled anew where shapes
change. Lists are read on the device, so nothing waits for the host.

A program has the rows of one block and one query head. Blocks that lie before its first row need no mask; they ascend
and do not overlap, so of those that a row may not see whole there are few, and they are the last of the list.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from harness.engine.kernels.online_softmax import begin, weigh

# How programs are launched, by rows a block and keys they read at a time.
_LAUNCH = {
    (64, 64): {"num_warps": 4, "num_stages": 3},
    (128, 64): {"num_warps": 8, "num_stages": 3},
    (128, 128): {"num_warps": 8, "num_stages": 3},
}


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    counts: Tensor,
    width: int,
    rows: int,
    singles: Tensor | None = None,
    single_counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Row i attends to those keys j <= i that its block of rows has listed.

    Args:
        q: [n, heads, d], d a power of two and at least 16. k, v: [n, kv_heads, d]. Tokens may lie apart, heads and
            channels may not.
        blocks: [heads, ceil(n / rows), most] int32, the first key of each block, ascending and `width` apart at least;
            contiguous but for the heads. Keys of a block that a row may not see, or that are not there, do not count.
        counts: [heads, ceil(n / rows)] int32, how many blocks count.
        width: keys a block, a multiple of 64. rows: rows a block, 64 or 128.
        singles, single_counts: the same for single keys, none of them in a block; None for none.

    Returns:
        [n, heads * d], and how many pairs of query and key that took, [heads, ceil(n / rows)] int32.
    """
    n, heads, dim = q.shape
    assert q.stride()[1:] == (dim, 1) and k.stride()[1:] == v.stride()[1:] == (dim, 1)
    out, pairs = q.new_empty((n, heads * dim)), torch.empty_like(counts, memory_format=torch.contiguous_format)
    keys, key_counts = (blocks, counts) if singles is None or single_counts is None else (singles, single_counts)
    row_blocks, group, tile = counts.shape[1], heads // k.shape[1], rows if width % rows == 0 else 64
    _attend[(row_blocks * group, k.shape[1])](
        q, k, v, out, pairs, blocks, counts, keys, key_counts, n, row_blocks,
        q.stride(0), k.stride(0), v.stride(0),
        blocks.stride(0), blocks.stride(1), counts.stride(0),
        keys.stride(0), keys.stride(1), key_counts.stride(0),
        GROUP=group, DIM=dim, ROWS=rows, WIDTH=width, SINGLES=keys is not blocks, SCALE=dim**-0.5 * math.log2(math.e),
        TILE=tile, **_LAUNCH[rows, tile],
    )  # fmt: skip
    return out, pairs


@triton.jit  # type: ignore[untyped-decorator]
def _take_in_blocks(
    query, row, k, v, blocks, first, last, n, k_stride, v_stride, top, total, acc, pairs,
    MASKED: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, SCALE: tl.constexpr,
) -> Any:  # fmt: skip
    """Attends to the blocks from the `first` of the list to before the `last`; `pairs` counts where keys are masked."""
    PIECES: tl.constexpr = WIDTH // TILE
    at, step = tl.arange(0, DIM), tl.arange(0, TILE)
    for piece in tl.range(first * PIECES, last * PIECES):
        start = tl.load(blocks + piece // PIECES) + piece % PIECES * TILE
        keys, values = k + start.to(tl.int64) * k_stride, v + start.to(tl.int64) * v_stride
        seen = start + step[None, :] <= row[:, None]
        if MASKED:
            there = start + step < n
            key = tl.load(keys + step[None, :] * k_stride + at[:, None], mask=there[None, :], other=0.0)
            value = tl.load(values + step[:, None] * v_stride + at[None, :], mask=there[:, None], other=0.0)
            pairs += tl.sum((seen & (row < n)[:, None]).to(tl.int32))
        else:
            key = tl.load(keys + step[None, :] * k_stride + at[:, None])
            value = tl.load(values + step[:, None] * v_stride + at[None, :])
        top, total, acc = weigh(query, key, value, top, total, acc, seen, MASKED, SCALE)
    return top, total, acc, pairs


@triton.jit  # type: ignore[untyped-decorator]
def _take_in_singles(
    query, row, k, v, singles, count, n, k_stride, v_stride, top, total, acc, pairs,
    DIM: tl.constexpr, TILE: tl.constexpr, SCALE: tl.constexpr,
) -> Any:  # fmt: skip
    """Attends to keys from anywhere."""
    at, step = tl.arange(0, DIM), tl.arange(0, TILE)
    for start in tl.range(0, count, TILE):
        inside = start + step < count
        token = tl.load(singles + start + step, mask=inside, other=0)
        far = token.to(tl.int64)
        key = tl.load(k + far[None, :] * k_stride + at[:, None], mask=inside[None, :], other=0.0)
        value = tl.load(v + far[:, None] * v_stride + at[None, :], mask=inside[:, None], other=0.0)
        seen = inside[None, :] & (token[None, :] <= row[:, None])
        pairs += tl.sum((seen & (row < n)[:, None]).to(tl.int32))
        top, total, acc = weigh(query, key, value, top, total, acc, seen, True, SCALE)
    return top, total, acc, pairs


@triton.jit(do_not_specialize=["n", "row_blocks", "head_blocks", "row_blocks_apart", "head_singles", "row_singles"])
def _attend(
    q, k, v, out, pairs, blocks, counts, singles, single_counts, n, row_blocks, q_stride, k_stride, v_stride,
    head_blocks, row_blocks_apart, head_counts, head_singles, row_singles, head_single_counts,
    GROUP: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, SINGLES: tl.constexpr,
    TILE: tl.constexpr, SCALE: tl.constexpr,
) -> Any:  # fmt: skip
    """One block of rows of one query head; the latest, which have most to do, come first."""
    kv_head, head = tl.program_id(1), tl.program_id(1) * GROUP + tl.program_id(0) % GROUP
    block = row_blocks - 1 - tl.program_id(0) // GROUP
    at, row = tl.arange(0, DIM), block * ROWS + tl.arange(0, ROWS)
    mine = (row < n)[:, None]
    query = tl.load(q + row.to(tl.int64)[:, None] * q_stride + head * DIM + at[None, :], mask=mine, other=0.0)
    k += kv_head * DIM
    v += kv_head * DIM
    top, total, acc = begin(ROWS, DIM)

    count = tl.load(counts + head * head_counts + block)
    # As many blocks of this width reach beyond the first row at most.
    whole = tl.maximum(count - tl.cdiv(ROWS + WIDTH - 1, WIDTH), 0)
    seen = tl.minimum(n - block * ROWS, ROWS) * whole * WIDTH
    if SINGLES:
        listed = tl.load(single_counts + head * head_single_counts + block)
        singles += head.to(tl.int64) * head_singles + block.to(tl.int64) * row_singles
        top, total, acc, seen = _take_in_singles(
            query, row, k, v, singles, listed, n, k_stride, v_stride, top, total, acc, seen, DIM, TILE, SCALE
        )
    blocks += head.to(tl.int64) * head_blocks + block.to(tl.int64) * row_blocks_apart
    top, total, acc, seen = _take_in_blocks(
        query, row, k, v, blocks, 0, whole, n, k_stride, v_stride, top, total, acc, seen,
        False, DIM, WIDTH, TILE, SCALE,
    )  # fmt: skip
    top, total, acc, seen = _take_in_blocks(
        query, row, k, v, blocks, whole, count, n, k_stride, v_stride, top, total, acc, seen,
        True, DIM, WIDTH, TILE, SCALE,
    )  # fmt: skip

    place = row.to(tl.int64)[:, None] * (tl.num_programs(1) * GROUP * DIM) + head * DIM + at[None, :]
    tl.store(out + place, (acc / total[:, None]).to(out.dtype.element_ty), mask=mine)
    tl.store(pairs + head * row_blocks + block, seen)
