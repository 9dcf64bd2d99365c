"""A layer's cache that is full takes in a new token for the one of the lowest score, decided and done on the device.

A token leaves ahead of the next step's attention: then the newest token, which lies in the last slot, moves to its
slot. A step that ran and was not asked for has so taken nothing away that it should not. All layers are settled in one
launch at the beginning of a step, from the logits that their attention has left in the step before (`settle`).
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from harness.engine.kernels.online_softmax import is_last

# Logits that a program looks at a time, and tokens of a head at most.
_LOGITS, _BLOCK = 8192, 1024


def drop_chosen(chosen: Tensor, positions: Tensor, like: Tensor, table: Tensor, layer: int, count: int = 1) -> None:
    """Moves the layer's last token to the slot of the one that was chosen to go, and takes one off the layer's length.

    Args:
        chosen: [layers] int64, the slot of the token that goes; -1 for none.
        positions: [layers, room] int64 contiguous, of the tokens in each slot.
        like: a token's keys in memory that a row of the table names, [kv_heads, head_dim] or [head_dim].
        table: [layers, 3] int64, see `harness.engine.kernels.decode_attention`; advanced, and is changed.
        layer: row of it.
        count: rows of the table, from `layer` on, that this is done for.
    """
    size = like.numel()
    _drop[(count,)](
        chosen, positions, like, table, layer, positions.shape[1], SIZE=size, WIDTH=triton.next_power_of_2(size)
    )


def settle(
    logits: Tensor, norms: Tensor, sums: Tensor | None, positions: Tensor, limits: Tensor, recents: Tensor,
    position: Tensor, like: Tensor, counters: Tensor, table: Tensor,
) -> None:  # fmt: skip
    """Of every list of a layer that holds more than its limit, the token of the lowest score goes.

    A layer has a list for each KV head, or one for all. A token's score is the weight that the last step's attention
    gave it, mean over the query heads of a list, or the sum of these over all steps. Of equal ones the last position
    goes. The token that comes next is noted in the slot that it will have, behind those that are left.

    Args:
        logits: [requests, layers, heads, room] float32 contiguous, and norms: [requests, layers, heads], as the last
            step's `DecodeAttention.dense` left them; norms of infinity where there was none.
        sums: [requests, layers, lists, room] float32 contiguous, of the token in each slot; None for the last step's
            alone.
        positions: [requests, layers, lists, room] int64 contiguous.
        limits: [requests, layers] int64, tokens that each layer may hold.
        recents: [requests, layers] int64, how many tokens before the next one stay.
        position: [requests] int64, of the token that comes next.
        like: [kv_heads, head_dim], of the dtype of keys and values.
        counters: [requests, layers] int32, zeros, and is left so.
        table: [requests * layers, 3] int64, see `harness.engine.kernels.decode_attention`, advanced; lengths are
            brought down to the limits.
    """
    (requests, layers, lists, room), heads, size = positions.shape, logits.shape[2], like.numel()
    group = heads // lists
    padded = triton.next_power_of_2(group)
    _settle[(requests * layers, lists)](
        logits, norms, norms if sums is None else sums, positions, limits, recents, position, like, counters, table,
        room, layers, LISTS=lists, GROUP=group, PADDED=padded, SIZE=size // lists,
        WIDTH=triton.next_power_of_2(size // lists), SUMS=sums is not None,
        BLOCK=min(_BLOCK, _LOGITS // padded), num_warps=8,
    )  # fmt: skip


@triton.jit
def _lower(lowest, places, slots, score, place, slot) -> Any:
    """Lane by lane, what has the lower score so far, and of equal ones the later place."""
    lower = (score < lowest) | ((score == lowest) & (place > places))
    return tl.where(lower, score, lowest), tl.where(lower, place, places), tl.where(lower, slot, slots)


@triton.jit
def _lowest(lowest, places, slots) -> Any:
    """The slot that all lanes agree on."""
    candidate = lowest == tl.min(lowest, 0)
    candidate = candidate & (places == tl.max(tl.where(candidate, places, -1), 0))
    return tl.max(tl.where(candidate, slots, -1), 0)


@triton.jit(do_not_specialize=["layer", "room"])  # type: ignore[untyped-decorator]
def _drop(chosen, positions, like, table, layer, room, SIZE: tl.constexpr, WIDTH: tl.constexpr) -> Any:
    layer += tl.program_id(0)
    slot, last = tl.load(chosen + layer), tl.load(table + layer * 3 + 2) - 1
    mine = positions + layer * room
    if slot >= 0:
        _move(table + layer * 3, like, last, slot, SIZE, WIDTH)
        tl.store(mine + slot, tl.load(mine + last))
        # All threads have read the length before one of them writes it.
        tl.debug_barrier()
        tl.store(table + layer * 3 + 2, last)


@triton.jit
def _move(row, like, source, into, SIZE: tl.constexpr, WIDTH: tl.constexpr) -> Any:
    """Copies piece `source` of a layer's keys, and of its values, to piece `into`; pieces have SIZE channels."""
    at = tl.arange(0, WIDTH)
    for which in tl.static_range(2):
        store = tl.multiple_of(tl.load(row + which).to(tl.pointer_type(like.dtype.element_ty)), 16)
        tl.store(store + into * SIZE + at, tl.load(store + source * SIZE + at, mask=at < SIZE), mask=at < SIZE)


@triton.jit(do_not_specialize=["room", "layers"])  # type: ignore[untyped-decorator]
def _settle(
    logits, norms, sums, positions, limits, recents, position, like, counters, table, room, layers,
    LISTS: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    SUMS: tl.constexpr, BLOCK: tl.constexpr,
) -> Any:  # fmt: skip
    """One list of one layer of one request."""
    layer, this = tl.program_id(0), tl.program_id(0) * LISTS + tl.program_id(1)
    count, coming = tl.load(table + layer * 3 + 2), tl.load(position + layer // layers)
    recent, full = coming - tl.load(recents + layer), count > tl.load(limits + layer)
    head, mine = tl.arange(0, PADDED), this.to(tl.int64) * room
    norm = tl.load(norms + this * GROUP + head, mask=head < GROUP, other=float("inf"))
    logits += mine * GROUP + head[:, None] * room
    positions += mine
    lowest = tl.full((BLOCK,), float("inf"), tl.float32)
    places, slots = tl.full((BLOCK,), -1, tl.int64), tl.full((BLOCK,), -1, tl.int64)
    for start in range(0, count, BLOCK):
        slot = start + tl.arange(0, BLOCK).to(tl.int64)
        there = slot < count
        seen = (head < GROUP)[:, None] & there[None, :]
        logit = tl.load(logits + slot[None, :], mask=seen, other=float("-inf"))
        got = tl.sum(tl.exp2(logit - norm[:, None]), 0) / GROUP
        if SUMS:
            got += tl.load(sums + mine + slot, mask=there, other=0.0)
            tl.store(sums + mine + slot, got, mask=there)
        place = tl.load(positions + slot, mask=there, other=-1)
        score = tl.where(there & (place < recent), got, float("inf"))
        lowest, places, slots = _lower(lowest, places, slots, score, place, slot)
    goes, last = _lowest(lowest, places, slots), count - 1
    # Sums are stored before one of them is read again.
    tl.debug_barrier()
    if full:
        kv_head = tl.program_id(1)
        _move(table + layer * 3, like, last * LISTS + kv_head, goes * LISTS + kv_head, SIZE, WIDTH)
        tl.store(positions + goes, tl.load(positions + last))
        if SUMS:
            tl.store(sums + mine + goes, tl.load(sums + mine + last))
    # All threads have read the last slot before one of them gives it to the token that comes next.
    tl.debug_barrier()
    free = tl.where(full, last, count)
    tl.store(positions + free, coming)
    if SUMS:
        tl.store(sums + mine + free, 0.0)
    if is_last(counters + layer, LISTS):
        tl.store(table + layer * 3 + 2, free)
