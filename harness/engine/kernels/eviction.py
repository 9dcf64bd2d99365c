"""A layer's cache that is full takes in a new token for the one of the lowest score, decided and done on the device.

A token leaves ahead of the next step's attention: then the newest token, which lies in the last slot, moves to its
slot. A step that ran and was not asked for has so taken nothing away that it should not. Scores are those of one step,
and one token leaves all KV heads (`choose_lowest`, `drop_chosen`), or they add up, and each head loses its own
(`settle`).
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def choose_lowest(
    scores: Tensor, limits: Tensor, position: Tensor, positions: Tensor, chosen: Tensor, table: Tensor, layer: int
) -> None:
    """Notes the new token's position, and which token is to go if the layer holds more than its limit.

    Args:
        scores: [room] float32, of all tokens of the layer, the new one, in slot `length`, included.
        limits: [layers] int64, tokens that each layer may hold.
        position: [1] int64, the new token's.
        positions: [layers, room] int64 contiguous, of the tokens in each slot; the new one's is written.
        chosen: [layers] int64, is given the slot of the lowest score, of equal ones the last position's; -1 for none.
        table: [layers, 3] int64, see `harness.engine.kernels.decode_attention`, not yet advanced. layer: row of it.
    """
    _choose[(1,)](scores, limits, position, positions, chosen, table, layer, positions.shape[1], BLOCK=_BLOCK)


def drop_chosen(chosen: Tensor, positions: Tensor, like: Tensor, table: Tensor, layer: int, count: int = 1) -> None:
    """Moves the layer's last token to the slot of the one that was chosen to go, and takes one off the layer's length.

    Args:
        chosen, positions, table, layer: as in `choose_lowest`; the table is advanced, and is changed.
        like: a token's keys in memory that a row of the table names, [kv_heads, head_dim] or [head_dim].
        count: rows of the table, from `layer` on, that this is done for.
    """
    size = like.numel()
    _drop[(count,)](
        chosen, positions, like, table, layer, positions.shape[1], SIZE=size, WIDTH=triton.next_power_of_2(size)
    )


def settle(
    sums: Tensor, scores: Tensor, positions: Tensor, held: Tensor, limits: Tensor, recents: Tensor, position: Tensor,
    like: Tensor, table: Tensor, layer: int,
) -> None:  # fmt: skip
    """Adds the last step's scores to the sums; where that leaves more than the limit, each head's lowest sum goes.

    Of equal ones the last position goes; `recents` tokens before the newest one's next position stay.

    Args:
        sums, scores: [layers, kv_heads, room] float32 contiguous, of the token in each slot; scores become 0.
        positions: [layers, kv_heads, room] int64 contiguous.
        held: [layers] int64, slots that are in use; this is left as it is.
        limits, recents: [layers] int64.
        position: [1] int64, of the token that comes next.
        like, table, layer: as in `drop_chosen`; of the table only addresses are read.
    """
    heads, dim = like.shape
    _settle[(heads,)](
        sums, scores, positions, held, limits, recents, position, like, table, layer, sums.shape[2],
        HEADS=heads, DIM=dim, WIDTH=triton.next_power_of_2(dim), BLOCK=_BLOCK,
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
def _choose(scores, limits, position, positions, chosen, table, layer, room, BLOCK: tl.constexpr) -> Any:
    newest, new = tl.load(table + layer * 3 + 2), tl.load(position)
    mine = positions + layer * room
    lowest = tl.full((BLOCK,), float("inf"), tl.float32)
    places, slots = tl.full((BLOCK,), -1, tl.int64), tl.full((BLOCK,), -1, tl.int64)
    for start in range(0, newest + 1, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        score = tl.load(scores + slot, mask=slot <= newest, other=float("inf"))
        place = tl.where(slot == newest, new, tl.load(mine + slot, mask=slot < newest, other=-1))
        lowest, places, slots = _lower(lowest, places, slots, score, place, slot)
    goes = _lowest(lowest, places, slots)
    tl.store(mine + newest, new)
    tl.store(chosen + layer, tl.where(newest >= tl.load(limits + layer), goes, -1))


@triton.jit(do_not_specialize=["layer", "room"])  # type: ignore[untyped-decorator]
def _drop(chosen, positions, like, table, layer, room, SIZE: tl.constexpr, WIDTH: tl.constexpr) -> Any:
    layer += tl.program_id(0)
    slot, last = tl.load(chosen + layer), tl.load(table + layer * 3 + 2) - 1
    pointer = tl.pointer_type(like.dtype.element_ty)
    mine, at = positions + layer * room, tl.arange(0, WIDTH)
    if slot >= 0:
        for which in tl.static_range(2):
            store = tl.multiple_of(tl.load(table + layer * 3 + which).to(pointer), 16)
            moved = tl.load(store + last * SIZE + at, mask=at < SIZE)
            tl.store(store + slot * SIZE + at, moved, mask=at < SIZE)
        tl.store(mine + slot, tl.load(mine + last))
        # All threads have read the length before one of them writes it.
        tl.debug_barrier()
        tl.store(table + layer * 3 + 2, last)


@triton.jit(do_not_specialize=["layer", "room"])  # type: ignore[untyped-decorator]
def _settle(
    sums, scores, positions, held, limits, recents, position, like, table, layer, room,
    HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
) -> Any:  # fmt: skip
    head, count = tl.program_id(0), tl.load(held + layer)
    mine = (layer * HEADS + head).to(tl.int64) * room
    sums, scores, positions = sums + mine, scores + mine, positions + mine
    recent = tl.load(position) - tl.load(recents + layer)
    lowest = tl.full((BLOCK,), float("inf"), tl.float32)
    places, slots = tl.full((BLOCK,), -1, tl.int64), tl.full((BLOCK,), -1, tl.int64)
    for start in range(0, count, BLOCK):
        slot = start + tl.arange(0, BLOCK).to(tl.int64)
        there = slot < count
        got = tl.load(sums + slot, mask=there, other=0.0) + tl.load(scores + slot, mask=there, other=0.0)
        tl.store(sums + slot, got, mask=there)
        tl.store(scores + slot, 0.0, mask=there)
        place = tl.load(positions + slot, mask=there, other=-1)
        score = tl.where(there & (place < recent), got, float("inf"))
        lowest, places, slots = _lower(lowest, places, slots, score, place, slot)
    goes, last, at = _lowest(lowest, places, slots), count - 1, tl.arange(0, WIDTH)
    # Sums are stored before one of them is read again.
    tl.debug_barrier()
    if count > tl.load(limits + layer):
        for which in tl.static_range(2):
            store = tl.multiple_of(tl.load(table + layer * 3 + which).to(tl.pointer_type(like.dtype.element_ty)), 16)
            moved = tl.load(store + (last * HEADS + head) * DIM + at, mask=at < DIM)
            tl.store(store + (goes * HEADS + head) * DIM + at, moved, mask=at < DIM)
        tl.store(positions + goes, tl.load(positions + last))
        its = tl.load(sums + last)
        # All threads have read it before one of them empties the slot for the token that comes next.
        tl.debug_barrier()
        tl.store(sums + goes, its)
        tl.store(sums + last, 0.0)
