"""MInference's lists (Jiang et al., arXiv 2407.02490): blocks along diagonals, and the columns that lie in none.

A block of rows follows its diagonals through the keys, which is a chain of dependent steps, so each lane of a program
has one block of rows. The plain equivalent is `methods.common.vertical_slash`, where the rule is written out.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_LANES = 32
_TILE = 128


def diagonal_blocks(nearer: Tensor, row_blocks: int, width: int, most: int) -> tuple[Tensor, Tensor]:
    """The blocks that each block of rows opens along its diagonals.

    Args:
        nearer: [heads, n + 1] int32, for each offset the largest chosen one below it, -1 if there is none; 0 is chosen.
        row_blocks: ceil(n / width). width: rows and keys a block. most: room in a list.

    Returns:
        [heads, row_blocks, most] int32, first keys, ascending, and [heads, row_blocks] int32, how many.
    """
    heads, n = nearer.shape[0], nearer.shape[1] - 1
    blocks = nearer.new_empty((heads, row_blocks, most))
    counts = nearer.new_empty((heads, row_blocks))
    _follow[(triton.cdiv(row_blocks, _LANES), heads)](
        nearer, blocks, counts, n, row_blocks, most, WIDTH=width, LANES=_LANES, num_warps=1
    )
    return blocks, counts


def free_columns(columns: Tensor, blocks: Tensor, counts: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Of the columns of a head, those that a block of rows sees outside of its blocks.

    Args:
        columns: [heads, most] int32, ascending; a number beyond all keys where a head has fewer.
        blocks, counts: as `diagonal_blocks` returns them. width: keys a block.

    Returns:
        [heads, row_blocks, most] int32, ascending, and [heads, row_blocks] int32, how many.
    """
    heads, row_blocks, room = blocks.shape
    most = columns.shape[1]
    free, free_counts = columns.new_empty((heads, row_blocks, most)), torch.empty_like(counts)
    _free[(row_blocks, heads)](
        columns, blocks, counts, free, free_counts, row_blocks, room, most,
        WIDTH=width, STEPS=max(1, room.bit_length()), TILE=_TILE, num_warps=4,
    )  # fmt: skip
    return free, free_counts


@triton.jit(do_not_specialize=["n", "row_blocks", "most"])  # type: ignore[untyped-decorator]
def _follow(nearer, blocks, counts, n, row_blocks, most, WIDTH: tl.constexpr, LANES: tl.constexpr) -> Any:
    """Some blocks of rows of one head, each in a lane."""
    head, block = tl.program_id(1), tl.program_id(0) * LANES + tl.arange(0, LANES)
    mine = block < row_blocks
    nearer += head.to(tl.int64) * (n + 1)
    blocks += (head.to(tl.int64) * row_blocks + block) * most
    end = (block + 1) * WIDTH
    # The offset at which a lane's last block ends, seen from the end of its rows.
    at = tl.minimum(tl.load(nearer + tl.minimum(end, n), mask=mine, other=0), end - WIDTH)
    count = tl.zeros((LANES,), tl.int32)
    going = mine
    while tl.max(going.to(tl.int32), 0) > 0:
        tl.store(blocks + count, end - at - WIDTH, mask=going)
        count += going.to(tl.int32)
        going &= at > 0
        next_one = tl.load(nearer + at, mask=going, other=-1)
        going &= next_one >= 0
        at = tl.where(next_one >= at - WIDTH, at - WIDTH, next_one)
    tl.store(counts + head * row_blocks + block, count, mask=mine)


@triton.jit(do_not_specialize=["row_blocks", "room", "most"])  # type: ignore[untyped-decorator]
def _free(
    columns, blocks, counts, free, free_counts, row_blocks, room, most,
    WIDTH: tl.constexpr, STEPS: tl.constexpr, TILE: tl.constexpr,
) -> Any:  # fmt: skip
    """The columns of one block of rows, in their order."""
    block, head = tl.program_id(0), tl.program_id(1)
    this = head.to(tl.int64) * row_blocks + block
    columns += head.to(tl.int64) * most
    blocks += this * room
    free += this * most
    count, found, end = tl.load(counts + this), 0, (block + 1) * WIDTH
    for start in tl.range(0, most, TILE):
        place = start + tl.arange(0, TILE)
        column = tl.load(columns + place, mask=place < most, other=end)
        # The last block that begins at or before the column, if one does: between `low` and `high`.
        low, high = tl.zeros((TILE,), tl.int32), tl.zeros((TILE,), tl.int32) + count
        for _ in tl.static_range(STEPS):
            middle = (low + high) // 2
            before = tl.load(blocks + middle, mask=middle < high, other=end) <= column
            low, high = tl.where(before & (middle < high), middle + 1, low), tl.where(before, high, middle)
        first = tl.load(blocks + low - 1, mask=low > 0, other=-WIDTH)
        stays = (column < end) & (column >= first + WIDTH)
        number = stays.to(tl.int32)
        tl.store(free + found + tl.cumsum(number, 0) - 1, column, mask=stays)
        found += tl.sum(number, 0)
    tl.store(free_counts + this, found)
