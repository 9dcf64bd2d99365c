"""LazyLLM's decode on the device (Fu et al., arXiv 2407.14057): what a pruning point chooses, and what comes back.

Pruning points divide the layers into segments; segment 0 holds all tokens. A later one holds keys and values of some,
and a token that lacks them waits before one segment with its hidden state. At every step a pruning point chooses anew
among the tokens that the segment before it attended to. Chosen tokens that waited arrive: their hidden states run
through the segment beside the newest token.

Every choice stays on the device, in memory that does not move, so captured CUDA graphs serve every step.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from harness.engine.kernels.radix import BINS, BITS, digit_counts, next_digit

# Tokens a program reads at a time and its warps, and tokens a program counts: the best of those tried on an H200.
_BLOCK, _WARPS, _COUNTED = 4096, 8, 1024
# The first 12 bits behind the sign, which is never set, are counted by many programs at once; the rest is searched.
LEADS = tl.constexpr(4096)
REST = tl.constexpr(19)
# Depth of a token that is on its way.
ARRIVING = tl.constexpr(-1)


@dataclass(frozen=True)
class RevivalState:
    """Where all tokens of a request are; S segments, room for T tokens.

    Attributes:
        tokens: [S, 2, T] int32, slots in the segment's caches and positions of the tokens chosen at this step: first
            those with keys and values there, then those that arrive, by ascending position, the newest last.
        counts: [S, 3] int64: how many of the listed tokens have keys and values by now, how many are listed, how many
            arrive.
        slots: [S, T] int32, by position: slot in the segment's caches, for tokens that have one.
        depths: [T] int32, by position: the segment before which a token waits, having keys and values in all before it;
            S if it has them everywhere.
        homes: [T] int64, by position: address of a waiting token's hidden state.
        lengths: [S] int64, slots in use.
        wanted: [S, T] int32, by the newest token's position: how many tokens the pruning point before a segment
            chooses, 1 to as many as the segment before has listed.
        leads: [4096] int32, zero; keys: [T] int32. Both are for choosing in.
    """

    tokens: Tensor
    counts: Tensor
    slots: Tensor
    depths: Tensor
    homes: Tensor
    lengths: Tensor
    wanted: Tensor
    leads: Tensor
    keys: Tensor

    @classmethod
    def empty(cls, segments: int, room: int, device: torch.device | str) -> RevivalState:
        """One where nothing is said yet."""

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        small, large = torch.int32, torch.int64
        return cls(
            zeros(segments, 2, room, dtype=small), zeros(segments, 3, dtype=large), zeros(segments, room, dtype=small),
            zeros(room, dtype=small), zeros(room, dtype=large), zeros(segments, dtype=large),
            zeros(segments, room, dtype=small), zeros(LEADS.value, dtype=small), zeros(room, dtype=small),
        )  # fmt: skip

    @property
    def room(self) -> int:
        """Tokens that there is room for."""
        return self.depths.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return sum(getattr(self, field.name).nbytes for field in fields(self))


def choose(scores: Tensor, state: RevivalState, segment: int) -> None:
    """Lists for a segment the tokens that its pruning point chooses, and gives those that arrive slots in its caches.

    The newest token is always chosen, and arrives last. Of tokens with equal scores the first listed are chosen.

    Args:
        scores: [T] float32, of the tokens listed for the segment before, none negative or NaN.
        state: is changed.
        segment: 1 or later.
    """
    _count_leads[(triton.cdiv(state.room, _COUNTED),)](
        scores, state.counts, state.leads, segment, BLOCK=_COUNTED, num_warps=4
    )
    _choose[(1,)](
        scores, state.tokens, state.counts, state.slots, state.depths, state.lengths, state.wanted, state.leads,
        state.keys, segment, len(state.lengths), state.room,
        BLOCK=min(_BLOCK, max(128, triton.next_power_of_2(state.room))), num_warps=_WARPS,
    )  # fmt: skip


def enter(state: RevivalState, segment: int, newest: Tensor, rows: int, *, last: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The next arriving rows, by ascending position, so that none depends on one that follows.

    Args:
        segment: which they enter.
        newest: the newest token's hidden state, [1, width].
        rows: how many; rows too many are padding, copies of the newest.
        last: all that are left, behind the padding, the newest last. Otherwise the newest is not among them.

    Returns:
        Hidden states, [rows, width]; positions, [rows] int64; slots in the segment's caches, [rows] int32, -1 for
        padding.
    """
    width = newest.shape[1]
    hidden = newest.new_empty((rows, width))
    positions, slots = state.counts.new_empty(rows), state.slots.new_empty(rows)
    _enter[(rows,)](
        newest, hidden, positions, slots, state.tokens, state.counts, state.homes,
        segment, state.room, width, rows, LAST=last, BLOCK=triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip
    return hidden, positions, slots


def leave(state: RevivalState, hidden: Tensor, positions: Tensor, slots: Tensor, *, last: bool) -> None:
    """Stores the hidden states of rows as they leave a segment, from where the next one will fetch what it chooses.

    Args:
        hidden, positions, slots: of rows that have entered, see `enter`. last: as there; the newest is not stored.
    """
    rows, width = hidden.shape
    if rows > last:
        _leave[(rows - last,)](
            hidden, positions, slots, state.homes, width, BLOCK=triton.next_power_of_2(width), num_warps=4
        )


@triton.jit  # type: ignore[untyped-decorator]
def _key(scores, index, inside) -> Any:
    """Scores as integers of the same order: bits of numbers that are not negative."""
    return tl.load(scores + index, mask=inside, other=0.0).to(tl.uint32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _count_leads(scores, counts, leads, segment, BLOCK: tl.constexpr) -> Any:
    """How often scores begin with which bits, the newest token's left out."""
    others = tl.load(counts + (segment - 1) * 3 + 1).to(tl.int32) - 1
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(0) * BLOCK < others:
        lead = (_key(scores, index, index < others) >> REST).to(tl.int32)
        tl.atomic_add(leads + lead, 1, mask=index < others, sem="relaxed")


@triton.jit  # type: ignore[untyped-decorator]
def _last_lead(leads, need) -> Any:
    """The first bits of the last of the `need` best, how many to take of those that have them; empties the counts."""
    lead = tl.arange(0, LEADS)
    counts = tl.load(leads + lead)
    tl.store(leads + lead, 0)
    last = tl.sum((tl.cumsum(counts, 0, reverse=True) >= need).to(tl.int32), 0) - 1
    return last.to(tl.uint32) << REST, need - tl.sum(tl.where(lead > last, counts, 0), 0)


@triton.jit  # type: ignore[untyped-decorator]
def _gather_keys(scores, keys, count, prefix, BLOCK: tl.constexpr) -> Any:
    """Collects the keys that begin with the prefix; returns how many."""
    found = tl.full((), 0, tl.int32)
    for start in tl.range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        key = _key(scores, index, index < count)
        ours = ((index < count) & (key >> REST << REST == prefix)).to(tl.int32)
        tl.store(keys + tl.cumsum(ours, 0) - 1 + found, key.to(tl.int32, bitcast=True), mask=ours > 0)
        found += tl.sum(ours, 0)
    return found


@triton.jit  # type: ignore[untyped-decorator]
def _last_key(keys, count, low, need, BLOCK: tl.constexpr) -> Any:
    """Goes on with the other bits: candidates from where and how far, how many of them to take, and if all."""
    span = (tl.full((), 1, tl.uint32) << REST) - 1
    shift = REST - BITS
    searching = count > need
    whole = count <= need
    while searching:
        counts = tl.zeros((BINS,), tl.int32)
        for start in tl.range(0, count, BLOCK):
            index = start + tl.arange(0, BLOCK)
            # What is not there has a key that no candidate has.
            key = tl.load(keys + index, mask=index < count, other=-1).to(tl.uint32, bitcast=True)
            counts += digit_counts(key, low, span, shift)
        low, span, need, whole, searching, shift = next_digit(counts, low, span, need, shift)
    return low, span, need, whole


@triton.jit  # type: ignore[untyped-decorator]
def _list_cached(
    scores, before, into, slots, depths, count, low, span, need, whole, segment, room, BLOCK: tl.constexpr
) -> Any:
    """Lists chosen tokens that have keys and values, and marks the depths of those that arrive; returns how many."""
    equal_so_far = tl.full((), 0, tl.int32)
    found = tl.full((), 0, tl.int32)
    for start in tl.range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        key = _key(scores, index, index < count)
        chosen = (index < count) & (key >= low)
        if whole == 0:
            equal = (chosen & (key - low <= span)).to(tl.int32)
            rank = tl.cumsum(equal, 0) - equal + equal_so_far
            chosen = chosen & ((equal == 0) | (rank < need))
            equal_so_far += tl.sum(equal, 0)
        position = tl.load(before + room + index, mask=chosen, other=0)
        depth = tl.load(depths + position, mask=chosen, other=0)
        tl.store(depths + position, ARRIVING, mask=chosen & (depth == segment))
        cached = chosen & (depth > segment)
        place = tl.cumsum(cached.to(tl.int32), 0) - 1 + found
        tl.store(into + place, tl.load(slots + position, mask=cached, other=0), mask=cached)
        tl.store(into + room + place, position, mask=cached)
        found += tl.sum(cached.to(tl.int32), 0)
    return found


@triton.jit  # type: ignore[untyped-decorator]
def _list_arriving(into, slots, depths, end, at_first, slot_first, segment, room, BLOCK: tl.constexpr) -> Any:
    """Lists the marked tokens before position `end`, from `at_first` on; returns how many."""
    found = tl.full((), 0, tl.int32)
    for start in tl.range(0, end, BLOCK):
        position = start + tl.arange(0, BLOCK)
        marked = tl.load(depths + position, mask=position < end, other=0) == ARRIVING
        place = tl.cumsum(marked.to(tl.int32), 0) - 1 + found
        tl.store(depths + position, segment + 1, mask=marked)
        tl.store(slots + position, slot_first + place, mask=marked)
        tl.store(into + at_first + place, slot_first + place, mask=marked)
        tl.store(into + room + at_first + place, position, mask=marked)
        found += tl.sum(marked.to(tl.int32), 0)
    return found


@triton.jit  # type: ignore[untyped-decorator]
def _choose(
    scores, tokens, counts, slots, depths, lengths, wanted, leads, keys, segment, segments, room, BLOCK: tl.constexpr
) -> Any:
    """One program: the list is short, and every digit depends on the one before."""
    before, into = tokens + (segment - 1) * 2 * room, tokens + segment * 2 * room
    slots += segment * room
    # The newest token is the last one listed, and needs no score.
    others = tl.load(counts + (segment - 1) * 3 + 1).to(tl.int32) - 1
    newest = tl.load(before + room + others)
    need = tl.load(wanted + segment * room + newest) - 1
    length = tl.load(lengths + segment).to(tl.int32)
    low, need = _last_lead(leads, need)
    candidates = _gather_keys(scores, keys, others, low, BLOCK)
    # Other threads have stored what a thread reads: here the keys, below the marks.
    tl.debug_barrier()
    low, span, need, whole = _last_key(keys, candidates, low, need, BLOCK)
    cached = _list_cached(scores, before, into, slots, depths, others, low, span, need, whole, segment, room, BLOCK)
    tl.debug_barrier()
    arriving = _list_arriving(into, slots, depths, newest, cached, length, segment, room, BLOCK)
    last, slot = cached + arriving, length + arriving
    tl.store(into + last, slot)
    tl.store(into + room + last, newest)
    tl.store(slots + newest, slot)
    tl.store(depths + newest, segments)
    tl.store(lengths + segment, slot + 1)
    tl.store(counts + segment * 3, cached)
    tl.store(counts + segment * 3 + 1, last + 1)
    tl.store(counts + segment * 3 + 2, arriving + 1)


@triton.jit  # type: ignore[untyped-decorator]
def _enter(
    newest, hidden, positions, slots, tokens, counts, homes, segment, room, width, rows,
    LAST: tl.constexpr, BLOCK: tl.constexpr,
) -> Any:  # fmt: skip
    """One row."""
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    tokens += segment * 2 * room
    done = tl.load(counts + segment * 3).to(tl.int32)
    count = tl.load(counts + segment * 3 + 1).to(tl.int32)
    index = (count - rows if LAST else done) + row
    real = (index >= done) & (index < (count if LAST else count - 1))
    index = tl.where(real, index, count - 1)
    slot, position = tl.load(tokens + index), tl.load(tokens + room + index)
    tl.store(slots + row, tl.where(real, slot, -1))
    tl.store(positions + row, position)
    home = tl.multiple_of(tl.load(homes + position).to(tl.pointer_type(newest.dtype.element_ty)), 16)
    waited = index < count - 1
    state = tl.load(newest + at, mask=(at < width) & (waited == 0), other=0.0)
    state += tl.load(home + at, mask=(at < width) & waited, other=0.0)
    tl.store(hidden + row.to(tl.int64) * width + at, state, mask=at < width)


@triton.jit  # type: ignore[untyped-decorator]
def _leave(hidden, positions, slots, homes, width, BLOCK: tl.constexpr) -> Any:
    """One row."""
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    real = tl.load(slots + row) >= 0
    home = tl.load(homes + tl.load(positions + row)).to(tl.pointer_type(hidden.dtype.element_ty))
    inside = (at < width) & real
    state = tl.load(hidden + row.to(tl.int64) * width + at, mask=inside, other=0.0)
    tl.store(tl.multiple_of(home, 16) + at, state, mask=inside)
