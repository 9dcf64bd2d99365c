"""Choosing the best of many by radix search: what single steps of the search have in common.

The key of the last one that is chosen is found digit by digit, from the highest bits down; then all with greater keys
are chosen, and of those with that key the first. Candidates are the keys from `low` to `low + span`.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

# Bits that one pass of the search settles: 32 bins, a lane of a warp each, so that sums over them need no barrier.
BITS = tl.constexpr(5)
BINS = tl.constexpr(32)
# Keys of minus and plus infinity, as `sortable` makes them.
LEAST = tl.constexpr(0x007FFFFF)
GREATEST = tl.constexpr(0xFF800000)


@triton.jit
def sortable(scores, index, count) -> Any:
    """Scores as unsigned integers of the same order: of negative numbers all bits flipped, else the sign alone."""
    score = tl.load(scores + index, mask=index < count, other=float("-inf"))
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def first_shift(span) -> Any:
    """Where the first digit begins: no higher than the candidates differ, for which the exponent of a float serves."""
    exponent = (span.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
    return tl.maximum(exponent + 1 - BITS, 0)


@triton.jit
def digit_counts(key, low, span, shift) -> Any:
    """How often each digit comes next among the candidates."""
    ahead = key - low
    digit = (ahead >> shift.to(tl.uint32)) & (BINS - 1)
    return tl.histogram(digit.to(tl.int32), BINS, mask=ahead <= span)


@triton.jit
def next_digit(counts, low, span, need, shift) -> Any:
    """Settles a digit.

    Returns:
        The candidates that have it (low and span), how many of them to take, whether those are all, whether to go on,
        and with which shift.
    """
    bin = tl.arange(0, BINS)
    by = shift.to(tl.uint32)
    # How many of the candidates go on with this digit or a higher one.
    reach = tl.cumsum(counts, 0, reverse=True)
    digit = tl.sum((reach >= need).to(tl.int32), 0) - 1
    need -= tl.sum(tl.where(bin > digit, counts, 0), 0)
    below = digit.to(tl.uint32) << by
    span = tl.minimum(span - below, (tl.full((), 1, tl.uint32) << by) - 1)
    whole = tl.sum(tl.where(bin == digit, counts, 0), 0) <= need
    return low + below, span, need, whole, (shift > 0) & (whole == 0), tl.maximum(shift - BITS, 0)


@triton.jit
def search(scores, tokens, count, BLOCK: tl.constexpr) -> Any:
    """Looks for the last of the `count` best of so many scores, a block at a time.

    Returns:
        The candidates that are equal to it as far as it matters (low and span), and how many of them to take.
    """
    low, span = tl.full((), 0, tl.uint32), tl.full((), 0xFFFFFFFF, tl.uint32)
    need, searching, shift = count, count > 0, first_shift(span)
    while searching:
        counts = tl.zeros((BINS,), tl.int32)
        for start in tl.range(0, tokens, BLOCK):
            # Scores behind the last one are minus infinity: they come after all that count.
            counts += digit_counts(sortable(scores, start + tl.arange(0, BLOCK), tokens), low, span, shift)
        low, span, need, _, searching, shift = next_digit(counts, low, span, need, shift)
    return low, span, need


@triton.jit
def ranks(key, low, span, need, above_so_far, equal_so_far) -> Any:
    """Which of a block are chosen, the place of each among all chosen ones, and how many lie above and in the search.

    Chosen are keys above the candidates' and the first `need` candidates, of which there were so many in blocks before.
    """
    equal = key - low <= span
    above = (key > low) & (equal == 0)
    # One scan for both counts, 16 bits each.
    both = above.to(tl.uint32) + (equal.to(tl.uint32) << 16)
    before = tl.cumsum(both, 0) - both
    above_before = (before & 0xFFFF).to(tl.int32) + above_so_far
    equal_before = (before >> 16).to(tl.int32) + equal_so_far
    place = above_before + tl.minimum(equal_before, need)
    chosen = above | (equal & (equal_before < need))
    return chosen, place, tl.sum(above.to(tl.int32), 0), tl.sum(equal.to(tl.int32), 0)


@triton.jit
def store_chosen(into, index, key, low, span, need, above_so_far, equal_so_far) -> Any:
    """Stores the indices that are chosen, in order; returns how many lie above the candidates, and among them."""
    chosen, place, above, equal = ranks(key, low, span, need, above_so_far, equal_so_far)
    tl.store(into + place, index, mask=chosen)
    return above, equal


@triton.jit
def list_best(into, scores, tokens, count, BLOCK: tl.constexpr) -> Any:
    """Stores the indices of the `count` best of so many scores, of equal ones the first, in order."""
    low, span, need = search(scores, tokens, count, BLOCK)
    above, equal = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    for start in tl.range(0, tokens, BLOCK):
        index = start + tl.arange(0, BLOCK)
        found = store_chosen(into, index, sortable(scores, index, tokens), low, span, need, above, equal)
        above, equal = above + found[0], equal + found[1]
