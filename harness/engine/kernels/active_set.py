"""Which blocks a layer's decode attends to next, on the device in a few launches (SlimInfer, arXiv 2508.06447).

Before the first step mean keys of the units are made. In a step one launch multiplies them with the query, one takes
the softmax over all of them, and one, a single program a request, chooses the best blocks and compares them with those
that are active; requests that are decoded together are rows of the same launches. Sizes are those of the memory, so a
captured CUDA graph serves every prompt that fits: what is beyond a request has logits and scores of minus infinity.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from harness.engine.kernels.online_softmax import NOTHING, ROWS
from harness.engine.kernels.radix import ranks, search, sortable

# Units that a program multiplies with the query, and those whose shares a program adds up.
_RATED, _SHARED = 64, 256
# Elements that the one program looks at a time, and its warps.
_BLOCK, _WARPS = 1024, 8
# Where a slot has no block.
NONE = tl.constexpr(torch.iinfo(torch.int64).max)


def prepare(
    keys: Tensor, chosen: Tensor, units: Tensor, unit_lift: Tensor, lift: Tensor, state: Tensor, before: Tensor,
    *, unit: int, block: int, ends: tuple[int, int],
) -> None:  # fmt: skip
    """Makes ready what steps choose with.

    Args:
        keys: of the prompt's n tokens, [n, kv_heads, d] contiguous.
        chosen: [slots] int64, the blocks that are active first.
        units: [room for units, kv_heads, d] contiguous: takes the mean key of every unit, and zeros behind them.
        unit_lift: [room for units] float32: takes 0 for every unit, and minus infinity behind them.
        lift: [room for blocks] float32: takes infinity for the blocks that always stay, 0 for the others, and minus
            infinity behind them.
        state, before: [room for slots + 2] int64: both take the chosen blocks, `NONE` behind them, and two zeros.
        unit, block: tokens of each; the last ones may be shorter.
        ends: first and last blocks that always stay.
    """
    n, width = len(keys), keys.shape[1] * keys.shape[2]
    assert keys.is_contiguous() and units.is_contiguous()
    blocks, (sink, tail) = triton.cdiv(n, block), ends
    grid = (len(units), triton.cdiv(width, size := min(1024, triton.next_power_of_2(width))))
    _prepare[grid](
        keys, chosen, units, unit_lift, lift, state, before, n, len(chosen), len(lift), len(state) - 2, sink,
        blocks - tail, blocks, WIDTH=width, UNIT=unit, TOKENS=triton.next_power_of_2(unit), BLOCK=size, num_warps=4,
    )  # fmt: skip


def rate(q: Tensor, units: Tensor, unit_lift: Tensor) -> Tensor:
    """Relevance of each request's units: softmax over them of its query against their mean keys, mean over heads.

    Args:
        q: [requests, heads, d], heads contiguous; at most 16 of them share a KV head.
        units: [requests, units, kv_heads, d] contiguous.
        unit_lift: what is added to the units' logits, [requests, units] float32 contiguous.

    Returns:
        [requests, units] float32.
    """
    (requests, heads, d), (_, n, kv_heads, _) = q.shape, units.shape
    assert q.stride()[1:] == (d, 1) and units.is_contiguous() and heads <= ROWS.value * kv_heads
    assert unit_lift.is_contiguous()
    tiles = triton.cdiv(n, _RATED)
    logits = torch.empty((requests, heads, n), dtype=torch.float32, device=q.device)
    tops, totals = torch.empty((2, requests, heads, tiles), dtype=torch.float32, device=q.device)
    _logits[tiles, kv_heads, requests](
        q, units, unit_lift, logits, tops, totals, n, tiles, q.stride(0), KV_HEADS=kv_heads, GROUP=heads // kv_heads,
        DIM=d, SCALE=d**-0.5 * math.log2(math.e), BLOCK=_RATED, num_warps=4,
    )  # fmt: skip
    relevance = torch.empty((requests, n), dtype=torch.float32, device=q.device)
    _softmax[triton.cdiv(n, _SHARED), requests](
        logits, tops, totals, relevance, n, tiles, HEADS=heads, TILES=triton.next_power_of_2(tiles), BLOCK=_SHARED,
        num_warps=4,
    )  # fmt: skip
    return relevance


def reselect(relevance: Tensor, lift: Tensor, state: Tensor, before: Tensor, gamma: float) -> Tensor:
    """Chooses as many blocks as each request has active ones; they take over where too few of them are active.

    Args:
        relevance: of units, [requests, blocks * units a block] float32; a block counts as much as its best one.
        lift: what is added to the blocks' scores, [requests, blocks] float32.
        state: [requests, slots + 2] int64: the block in each slot, `NONE` where there is none, behind the others; then
            blocks that came in so far and steps in which some did. Is changed.
        before: the same; takes what `state` was.
        gamma: least share of the chosen blocks that must be active for the set to stay.

    All are contiguous.

    Returns:
        [requests, slots] int64: the block that comes into each slot, -1 where none does. The n-th that comes goes where
        the n-th that leaves was.
    """
    assert all(each.is_contiguous() for each in (relevance, lift, state, before))
    (requests, blocks), slots = lift.shape, state.shape[1] - 2
    per_block = relevance.shape[1] // blocks
    scores = torch.empty_like(lift)
    marks, fresh = (torch.empty((requests, blocks), dtype=torch.int32, device=lift.device) for _ in range(2))
    source = torch.empty((requests, slots), dtype=torch.int64, device=lift.device)
    size = max(32 * _WARPS, min(_BLOCK, triton.next_power_of_2(max(blocks, slots))))
    _reselect[(requests,)](
        relevance, lift, state, before, scores, marks, fresh, source, blocks, slots, gamma, UNITS=per_block,
        WIDE=triton.next_power_of_2(per_block), BLOCK=size, num_warps=_WARPS,
    )  # fmt: skip
    return source


@triton.jit(do_not_specialize=["n", "active", "blocks_room", "slots", "sink", "tail", "blocks"])  # type: ignore[untyped-decorator]
def _prepare(
    keys, chosen, units, unit_lift, lift, state, before, n, active, blocks_room, slots, sink, tail, blocks,
    WIDTH: tl.constexpr, UNIT: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
) -> Any:  # fmt: skip
    """The mean of a unit, as far as a program reaches; the very first one does the rest as well."""
    this = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin, token = this * UNIT, tl.arange(0, TOKENS)
    there = (token < UNIT) & (begin + token < n)
    place = (begin + token).to(tl.int64)[:, None] * WIDTH + at[None, :]
    value = tl.load(keys + place, mask=there[:, None] & (at < WIDTH)[None, :], other=0.0).to(tl.float32)
    held = tl.maximum(tl.minimum(n - begin, UNIT), 1)
    tl.store(units + this.to(tl.int64) * WIDTH + at, tl.sum(value, 0) / held, mask=at < WIDTH)
    if tl.program_id(1) == 0:
        tl.store(unit_lift + this, tl.where(begin < n, 0.0, float("-inf")))
        if this == 0:
            each = tl.arange(0, BLOCK)
            for start in tl.range(0, blocks_room, BLOCK):
                block = start + each
                raised = tl.where((block < sink) | (block >= tail), float("inf"), 0.0)
                tl.store(lift + block, tl.where(block < blocks, raised, float("-inf")), mask=block < blocks_room)
            for start in tl.range(0, slots + 2, BLOCK):
                slot = start + each
                own = tl.load(chosen + slot, mask=slot < active, other=NONE)
                own = tl.where(slot < slots, own, 0)
                tl.store(state + slot, own, mask=slot < slots + 2)
                tl.store(before + slot, own, mask=slot < slots + 2)


@triton.jit
def _logits(
    q, units, unit_lift, logits, tops, totals, n, tiles, apart,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr,
) -> Any:  # fmt: skip
    """Logits (base 2) of a tile of units, their maxima, and sums of exponentials relative to these."""
    request, kv_head, row, at = tl.program_id(2), tl.program_id(1), tl.arange(0, ROWS), tl.arange(0, DIM)
    q += request * apart
    units += request.to(tl.int64) * n * KV_HEADS * DIM
    unit_lift += request * n
    logits += request * KV_HEADS * GROUP * n
    tops += request * KV_HEADS * GROUP * tiles
    totals += request * KV_HEADS * GROUP * tiles
    unit = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head, mine, inside = kv_head * GROUP + row, row < GROUP, unit < n
    query = tl.load(q + head[:, None] * DIM + at[None, :], mask=mine[:, None], other=0.0)
    place = (unit.to(tl.int64)[None, :] * KV_HEADS + kv_head) * DIM + at[:, None]
    key = tl.load(units + place, mask=inside[None, :], other=0.0)
    lifted = tl.load(unit_lift + unit, mask=inside, other=float("-inf"))
    logit = tl.dot(query, key, input_precision="ieee") * SCALE + lifted[None, :]
    top = tl.maximum(tl.max(logit, 1), NOTHING)
    tl.store(logits + head[:, None] * n + unit[None, :], logit, mask=mine[:, None] & inside[None, :])
    tl.store(tops + head * tiles + tl.program_id(0), top, mask=mine)
    tl.store(totals + head * tiles + tl.program_id(0), tl.sum(tl.exp2(logit - top[:, None]), 1), mask=mine)


@triton.jit
def _softmax(
    logits, tops, totals, relevance, n, tiles, HEADS: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr
) -> Any:
    """Mean over heads of some units' shares."""
    request, unit, tile = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, TILES)
    logits += request * HEADS * n
    tops += request * HEADS * tiles
    totals += request * HEADS * tiles
    relevance += request * n
    share = tl.zeros((BLOCK,), tl.float32)
    for head in tl.range(0, HEADS):
        top = tl.load(tops + head * tiles + tile, mask=tile < tiles, other=NOTHING)
        total = tl.load(totals + head * tiles + tile, mask=tile < tiles, other=0.0)
        highest = tl.max(top, 0)
        norm = highest + tl.log2(tl.sum(total * tl.exp2(top - highest), 0))
        share += tl.exp2(tl.load(logits + head * n + unit, mask=unit < n, other=float("-inf")) - norm)
    tl.store(relevance + unit, share / HEADS, mask=unit < n)


@triton.jit
def _rate_blocks(
    relevance, lift, scores, marks, blocks, UNITS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr
) -> Any:
    """Scores of blocks, of which none is marked."""
    unit = tl.arange(0, WIDE)
    for start in tl.range(0, blocks, BLOCK):
        block = start + tl.arange(0, BLOCK)
        there = (block < blocks)[:, None] & (unit < UNITS)[None, :]
        shares = tl.load(relevance + block[:, None] * UNITS + unit[None, :], mask=there, other=0.0)
        lifted = tl.load(lift + block, mask=block < blocks, other=0.0)
        tl.store(scores + block, tl.max(shares, 1) + lifted, mask=block < blocks)
        tl.store(marks + block, 0, mask=block < blocks)


@triton.jit
def _mark_active(state, before, marks, slots, BLOCK: tl.constexpr) -> Any:
    """Marks active blocks with 1 and keeps the state; returns how many are active."""
    active = tl.full((), 0, tl.int32)
    for start in tl.range(0, slots, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        block = tl.load(state + slot, mask=slot < slots, other=NONE)
        tl.store(before + slot, block, mask=slot < slots)
        tl.store(marks + block, 1, mask=block != NONE)
        active += tl.sum((block != NONE).to(tl.int32), 0)
    return active


@triton.jit
def _list_fresh(scores, marks, fresh, blocks, active, BLOCK: tl.constexpr) -> Any:
    """Adds 2 to the marks of the best blocks, lists those that were not active; returns how many these are."""
    low, span, need = search(scores, blocks, active, BLOCK)
    above, equal, found = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    for start in tl.range(0, blocks, BLOCK):
        block = start + tl.arange(0, BLOCK)
        best, _, more_above, more_equal = ranks(sortable(scores, block, blocks), low, span, need, above, equal)
        mark = tl.load(marks + block, mask=block < blocks, other=1)
        comes = (best & (mark == 0)).to(tl.int32)
        tl.store(fresh + tl.cumsum(comes, 0) - 1 + found, block, mask=comes > 0)
        tl.store(marks + block, mark + 2, mask=best & (block < blocks))
        found, above, equal = found + tl.sum(comes, 0), above + more_above, equal + more_equal
    return found


@triton.jit
def _bring_in(state, marks, fresh, source, slots, swap, BLOCK: tl.constexpr) -> Any:
    """If they swap, fresh blocks take the slots of those that are not among the best; returns how many."""
    left = tl.full((), 0, tl.int32)
    for start in tl.range(0, slots, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        block = tl.load(state + slot, mask=slot < slots, other=NONE)
        mark = tl.load(marks + block, mask=block != NONE, other=2)
        leaves = ((mark < 2) & swap).to(tl.int32)
        comes = tl.load(fresh + tl.cumsum(leaves, 0) - 1 + left, mask=leaves > 0, other=-1).to(tl.int64)
        tl.store(source + slot, comes, mask=slot < slots)
        tl.store(state + slot, comes, mask=leaves > 0)
        left += tl.sum(leaves, 0)
    return left


@triton.jit(do_not_specialize=["blocks", "slots"])  # type: ignore[untyped-decorator]
def _reselect(
    relevance, lift, state, before, scores, marks, fresh, source, blocks, slots, gamma,
    UNITS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
) -> Any:  # fmt: skip
    """One program a request: blocks are few. Other threads have stored what a thread reads behind a barrier."""
    request = tl.program_id(0)
    relevance += request * blocks * UNITS
    lift, scores = lift + request * blocks, scores + request * blocks
    marks, fresh = marks + request * blocks, fresh + request * blocks
    state, before, source = state + request * (slots + 2), before + request * (slots + 2), source + request * slots
    _rate_blocks(relevance, lift, scores, marks, blocks, UNITS, WIDE, BLOCK)
    tl.debug_barrier()
    active = _mark_active(state, before, marks, slots, BLOCK)
    tl.debug_barrier()
    found = _list_fresh(scores, marks, fresh, blocks, active, BLOCK)
    tl.debug_barrier()
    # Of nobody, who has no slots, NaN: no set is changed.
    overlap = tl.div_rn((active - found).to(tl.float32), active.to(tl.float32))
    moved, swaps = tl.load(state + slots), tl.load(state + slots + 1)
    came = _bring_in(state, marks, fresh, source, slots, overlap < gamma, BLOCK)
    tl.store(before + slots, moved)
    tl.store(before + slots + 1, swaps)
    tl.store(state + slots, moved + came)
    tl.store(state + slots + 1, swaps + (overlap < gamma).to(tl.int64))
