"""Choosing the best of many by radix search: what single steps of the search have in common.

The key of the last one that is chosen is found digit by digit, from the highest bits down; then all with greater keys
are chosen, and of those with that key the first.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

# Bits that one pass of the search settles: 32 bins, a lane of a warp each, so that sums over them need no barrier.
BITS = tl.constexpr(5)
BINS = tl.constexpr(32)


@triton.jit
def sortable(scores, index, count) -> Any:
    """Scores as unsigned integers of the same order: of negative numbers all bits flipped, else the sign alone."""
    score = tl.load(scores + index, mask=index < count, other=float("-inf"))
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def digit_counts(key, prefix, known, shift) -> Any:
    """How often each digit comes next among the keys that begin with the prefix."""
    by = shift.to(tl.uint32)
    return tl.histogram(((key >> by) & (BINS - 1)).to(tl.int32), BINS, mask=(key & known) == prefix)


@triton.jit
def next_digit(counts, prefix, need, shift) -> Any:
    """Settles a digit.

    Returns:
        The prefix with it, which bits that is, how many of the keys that begin with it to take, whether those are all,
        whether to go on, and with which shift.
    """
    bin = tl.arange(0, BINS)
    by = shift.to(tl.uint32)
    # How many of the keys that begin with the prefix go on with this digit or a higher one.
    reach = tl.cumsum(counts, 0, reverse=True)
    digit = tl.sum((reach >= need).to(tl.int32), 0) - 1
    need -= tl.sum(tl.where(bin > digit, counts, 0), 0)
    prefix |= digit.to(tl.uint32) << by
    known = tl.full((), 0xFFFFFFFF, tl.uint32) << by
    whole = tl.sum(tl.where(bin == digit, counts, 0), 0) <= need
    return prefix, known, need, whole, (shift > 0) & (whole == 0), tl.maximum(shift - BITS, 0)
