"""Which blocks of a prompt go on, and which of its rows those are, in one launch (SlimInfer, arXiv 2508.06447)."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from harness.engine.kernels.radix import list_best

_WARPS = 8
# Rows that are listed at a time.
_LISTED = tl.constexpr(1024)


def best_blocks(
    scores: Tensor, count: int, block: int, rows: int, sink: int, tail: int, *, units: int = 1
) -> tuple[Tensor, Tensor]:
    """The best blocks, of equal ones the first, in the order of the text, and their rows.

    Args:
        scores: of units, `units` a block, the last block perhaps of fewer; float32 contiguous, without NaN. A block is
            worth as much as its best unit.
        count: how many are chosen, 1 to all; `tail` of them at least.
        block: rows a block; the last block may be shorter.
        rows: of all blocks.
        sink, tail: first and last blocks that are better than all others whatever their scores; one is last.

    Returns:
        [count] int64, and the rows' indices, int64; both ascending.
    """
    n = triton.cdiv(len(scores), units)
    assert scores.is_contiguous() and tail
    lifted = scores.new_empty(n)
    chosen = torch.empty(count, dtype=torch.int64, device=scores.device)
    index = chosen.new_empty(count * block - (n * block - rows))
    size = max(32 * _WARPS, min(1024, triton.next_power_of_2(n)))
    _best[(1,)](
        scores, lifted, chosen, index, n, count, len(index), sink, n - tail, len(scores), BLOCK=size, SIZE=block,
        UNITS=units, WIDE=triton.next_power_of_2(units), num_warps=_WARPS,
    )  # fmt: skip
    return chosen, index


@triton.jit(do_not_specialize=["n", "count", "rows", "sink", "tail", "rated"])  # type: ignore[untyped-decorator]
def _best(
    scores, lifted, chosen, index, n, count, rows, sink, tail, rated,
    BLOCK: tl.constexpr, SIZE: tl.constexpr, UNITS: tl.constexpr, WIDE: tl.constexpr,
) -> Any:  # fmt: skip
    """One program: blocks are few."""
    for start in tl.range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        unit, stays = tl.arange(0, WIDE)[None, :], (at < sink) | (at >= tail)
        place = at[:, None] * UNITS + unit
        score = tl.load(scores + place, mask=(unit < UNITS) & (place < rated), other=float("-inf"))
        tl.store(lifted + at, tl.where(stays, float("inf"), tl.max(score, 1)), mask=at < n)
    # Other threads have stored what a thread reads: here the scores, below the blocks.
    tl.debug_barrier()
    list_best(chosen, lifted, n, count, BLOCK)
    tl.debug_barrier()
    for start in tl.range(0, rows, _LISTED):
        row = start + tl.arange(0, _LISTED)
        first = tl.load(chosen + row // SIZE, mask=row < rows, other=0) * SIZE
        tl.store(index + row, first + row % SIZE, mask=row < rows)
