"""MInference's vertical-slash pattern (Jiang et al., arXiv 2407.02490): columns and diagonals, as lists of keys.

Blocks have 64 rows. A diagonal at offset o passes the rows [a, b) at the keys up to b - o, so it asks for the 64 keys
that end there, and for no end before 64. A block of rows takes its diagonals from the farthest to the nearest: one
whose end lies more than 64 keys behind what is open opens a range of its own, another one that ends behind it extends
the range by a whole 64. So ranges are made of blocks of 64 keys that begin anywhere. Columns outside of them come
singly.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from harness.engine.sparse import Choice, listed

ROWS = 64


def vertical_slash(columns: Tensor, offsets: Tensor, most: int) -> Choice:
    """The keys that columns and diagonals stand for.

    Args:
        columns: [heads, most] int32, ascending; n where a head has fewer.
        offsets: [heads, n] bool, which diagonals are chosen; 0, a row's own key, always is.
        most: no head has more diagonals.
    """
    n, row_blocks = offsets.shape[1], -(-offsets.shape[1] // ROWS)
    places = torch.arange(n, dtype=torch.int32, device=offsets.device)
    nearer = pad(torch.where(offsets, places, -1).cummax(1).values, (1, 0), value=-1)
    if offsets.is_cuda:
        from harness.engine.kernels.vertical_slash import diagonal_blocks, free_columns

        # A block is opened by an offset that no other one of its rows is opened by.
        blocks = diagonal_blocks(nearer, row_blocks, ROWS, min(row_blocks + 1, most))
        return Choice(ROWS, ROWS, *blocks, *free_columns(columns, *blocks, ROWS))
    blocks = _diagonal_blocks(nearer, row_blocks)
    return Choice(ROWS, ROWS, *blocks, *_free_columns(columns, *blocks))


def _diagonal_blocks(nearer: Tensor, row_blocks: int) -> tuple[Tensor, Tensor]:
    """All blocks of rows open their next block of keys at the same time.

    Args:
        nearer: [heads, n + 1] int32, for each offset the largest chosen one below it, -1 if there is none.
        row_blocks: ceil(n / 64).

    Returns:
        [heads, row_blocks, most] int32, first keys, and [heads, row_blocks] int32, how many.
    """
    ends = (torch.arange(row_blocks, dtype=torch.int32, device=nearer.device) + 1) * ROWS
    # The offset at which the last block ends, seen from the end of the rows.
    at = torch.minimum(nearer[:, ends.clamp(max=nearer.shape[1] - 1)], ends - ROWS)
    found, going = [], torch.ones_like(at, dtype=torch.bool)
    while going.any():
        found.append((ends - at - ROWS).masked_fill(~going, -1))
        following = nearer.gather(1, at.clamp(min=0).long())
        going = going & (following >= 0)
        at = torch.where(following >= at - ROWS, at - ROWS, following)
    blocks = torch.stack(found, 2)
    return blocks, (blocks >= 0).sum(2, dtype=torch.int32)


def _free_columns(columns: Tensor, blocks: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of each block of rows that it sees outside of its blocks, and how many those are."""
    starts = blocks.masked_fill(blocks < 0, torch.iinfo(torch.int32).max)
    each = columns.unsqueeze(1).expand(-1, blocks.shape[1], -1).contiguous()
    last = torch.searchsorted(starts, each, right=True) - 1
    covered = (last >= 0) & (each < starts.gather(2, last.clamp(min=0)) + ROWS)
    ends = (torch.arange(blocks.shape[1], device=columns.device).unsqueeze(1) + 1) * ROWS
    return listed(each, ~covered & (each < ends))


def offset_sums(attention: Tensor) -> Tensor:
    """Sums over all entries that look equally far back: [heads, w, n] of the last queries -> [heads, n]."""
    heads, w, n = attention.shape
    # From the newest key on, offset o stands at o + w - 1 in the first row, and one place earlier in each next one.
    flipped = pad(attention.flip(2), (0, w))
    return flipped.as_strided((heads, w, n), (w * (n + w), n + w - 1, 1), w - 1).sum(1)
